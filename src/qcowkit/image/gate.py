"""The reference gate: what an image mentions is opened here, or not at all.

A name is decided upon by its letters alone before the host is asked anything, so a refusal says
nothing about what exists. An admitted name is then walked component by component from the
directory that holds it, and what is returned is the very file that was looked at. Reliability
reference, section 1, "names in images"; the command line contract, "Reference gate"."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from qcowkit.errors import ReferenceDenied, StorageError
from qcowkit.references import Reference
from qcowkit.storage.file import FileStorage, check_kind

_MAX_LINKS = 40
_MAX_NAME = 4095

Parts = tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Root:
    """A directory below which names may be followed. `real`: its parts without symbolic links."""

    path: str
    real: Parts
    lexical: Parts


class _OutsideError(Exception):
    """The name, or a link on its way, leads out of every root. Never leaves this module."""


class ReferenceGate:
    """What the images of a chain may name; immutable, shared by all of them."""

    def __init__(self, *, allow: Sequence[str | Path] = (), below: bool, trust: bool) -> None:
        """Prefer the named constructors."""
        self._allow = tuple(os.fspath(directory) for directory in allow)
        self._below = below
        self._trust = trust

    @classmethod
    def deny_all(cls) -> Self:
        """Follows nothing: the default of the library, of `inspect` and of the services."""
        return cls(below=False, trust=False)

    @classmethod
    def below_image(cls, allow: Sequence[str | Path] = ()) -> Self:
        """Follows names to regular files below the naming image's directory or one of `allow`."""
        return cls(allow=allow, below=True, trust=False)

    @classmethod
    def trusting(cls) -> Self:
        """Follows every plain path, block devices included. Never for images of strangers."""
        return cls(below=False, trust=True)

    def admit(
        self, reference: Reference, *, directory: Path, writable: bool = False
    ) -> FileStorage:
        """Open the first candidate of `reference` that is admitted and can be opened.

        directory: where the naming image lies; relative names start there. The path of the result
        is `directory` joined with the name. Raises ReferenceDenied, with one text whatever the host
        holds, for names outside; StorageError for an allowed name that cannot be opened."""
        failure: StorageError | None = None
        for name in reference.names:
            try:
                return self._admit_name(name, reference, directory, writable=writable)
            except _OutsideError:
                continue
            except StorageError as error:
                failure = failure or error
        if failure is not None:
            raise failure
        raise ReferenceDenied(self._refusal(reference, directory))

    def _refusal(self, reference: Reference, directory: Path) -> str:
        names = ", ".join(repr(name) for name in reference.names) or "without a name"
        if self._trust:
            rule = "only plain paths are followed"
        elif self._below:
            places = ", ".join([str(directory), *self._allow])
            rule = f"only files below {places} may be named (see --allow)"
        else:
            rule = "no reference is followed here"
        return f"{reference.kind.value} {names}: not admitted: {rule}"

    def _admit_name(
        self, name: str, reference: Reference, directory: Path, *, writable: bool
    ) -> FileStorage:
        if not (self._trust or self._below) or not is_plain_path(name):
            raise _OutsideError
        path = os.path.join(directory, name)
        label = f"{reference.kind.value} {name!r}"
        if self._trust:
            return FileStorage.open(path, writable=writable)
        walk = _Walk(roots=self._roots(directory), path=path, label=label, writable=writable)
        start = _parts(os.path.realpath(directory))
        try:
            return walk.run(() if name.startswith("/") else start, _parts(name))
        except OSError as error:
            raise StorageError.wrap(error, operation="open", path=label) from error

    def _roots(self, directory: Path) -> tuple[_Root, ...]:
        return tuple(
            _Root(
                path=path,
                real=_parts(os.path.realpath(path)),
                lexical=_parts(os.path.abspath(path)),
            )
            for path in (os.fspath(directory) or ".", *self._allow)
        )


def is_plain_path(name: str) -> bool:
    """Whether `name` is a path and nothing else: no protocol, no control characters, a file name.

    A colon before the first slash is how protocols begin (`nbd:`, `json:`, `file:`)."""
    if (
        not name
        or len(name) > _MAX_NAME
        or name.endswith(("/", "/.", "/.."))
        or name in (".", "..")
    ):
        return False
    if any(char < " " or "\x7f" <= char <= "\x9f" for char in name):
        return False
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return ":" not in name.partition("/")[0]


def below(root: Parts, start: Parts, parts: Parts) -> Parts | None:
    """What to walk from `root` to get where `parts`, begun at `start`, lead; None for outside.

    Pure. Outside the root `..` may only lead upwards from the start: `link/..` means different
    things to the kernel and to the letters, and only inside the root can the walk tell."""
    depth = len(root)
    position = list(start)
    left = start[depth:] + parts if start[:depth] == root else None
    plain = False
    for index, part in enumerate(parts):
        if part != "..":
            position.append(part)
            plain = True
            if left is None and tuple(position) == root:
                left = parts[index + 1 :]
        elif left is not None and len(position) > depth:
            position.pop()
        elif plain:
            return None
        elif position:
            position.pop()
            left = None
    return left or None


def _parts(path: str) -> Parts:
    return tuple(part for part in path.split("/") if part not in ("", "."))


@dataclass(slots=True, kw_only=True)
class _Walk:
    """One walk from a root to a file, holding the descriptors of the directories on the way."""

    roots: tuple[_Root, ...]
    path: str
    label: str
    writable: bool
    links: int = 0
    root: _Root | None = None
    names: list[str] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)

    def run(self, start: Parts, parts: Parts) -> FileStorage:
        """Follow `parts` from the absolute `start`. Raises _OutsideError, OSError, StorageError."""
        try:
            pending = self._enter(start, parts)
            while True:
                head, rest = pending[0], pending[1:]
                if head == "..":
                    pending = self._ascend(rest)
                    continue
                mode = os.stat(head, dir_fd=self.descriptors[-1], follow_symlinks=False).st_mode
                if stat.S_ISLNK(mode):
                    pending = self._follow(head, rest)
                elif rest:
                    self._descend(head)
                    pending = rest
                else:
                    return self._open(head, mode)
        finally:
            self._close()

    def _enter(self, start: Parts, parts: Parts) -> Parts:
        """Stand in the first root that the letters lead to; returns what is left to walk."""
        self._close()
        for root in self.roots:
            for place in (root.real, root.lexical):
                left = below(place, start, parts)
                if left is not None:
                    self.root, self.names = root, []
                    flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
                    self.descriptors = [os.open(root.path, flags)]
                    return left
        raise _OutsideError

    def _ascend(self, rest: Parts) -> Parts:
        if self.names:
            self.names.pop()
            os.close(self.descriptors.pop())
            return _some(rest)
        assert self.root is not None
        # Above the host's own root there is nothing; above ours the letters decide anew.
        return self._enter(self.root.real, ("..", *rest)) if self.root.real else _some(rest)

    def _descend(self, name: str) -> None:
        flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        self.descriptors.append(os.open(name, flags, dir_fd=self.descriptors[-1]))
        self.names.append(name)

    def _follow(self, name: str, rest: Parts) -> Parts:
        """What is left to walk behind a symbolic link, which is judged like any other name."""
        self.links += 1
        if self.links > _MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        target = os.readlink(name, dir_fd=self.descriptors[-1])
        parts = (*_parts(target), *rest)
        return self._enter((), parts) if target.startswith("/") else _some(parts)

    def _open(self, name: str, mode: int) -> FileStorage:
        # Looked at before it is opened: opening some devices has effects.
        check_kind(mode, path=self.label, devices=False)
        try:
            return FileStorage.open(
                name,
                writable=self.writable,
                follow=False,
                devices=False,
                dir_fd=self.descriptors[-1],
                name=self.path,
            )
        except StorageError as error:
            raise StorageError("open", path=self.label, errno=error.errno) from error

    def _close(self) -> None:
        while self.descriptors:
            os.close(self.descriptors.pop())


def _some(parts: Parts) -> Parts:
    """`parts`, unless none are left: then the walk has come to a directory."""
    if not parts:
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR))
    return parts
