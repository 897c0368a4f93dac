"""Locks on the files of images, as qemu takes them and understands them. Numpy-free.

A user of a file holds read locks on single bytes: 100 + i says "I use permission i", 200 + i says
"nobody else may". Read locks never exclude one another, so everybody can say what they do. A
newcomer says it first, then looks whether anybody else's words contradict, by testing for a write
lock. Two that come at once may both see the other and both give way: so it is tried again.

The locks belong to the open file description (fcntl(2), "Open file description locks"): closing the
file gives them back, a process that dies leaves none, and a second open of the file is another
user, in the same process too. The process-wide kind would be lost with any descriptor of the file.
Reliability reference, section 4.4."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from qcowkit.errors import ImageBusy, StorageError
from qcowkit.storage.file import FileStorage

# auto: where the host takes no locks, go on without. on: refuse then. off: take none.
LockMode = Literal["auto", "on", "off"]

# How the kernel is asked: descriptor, command, struct flock; answers with the struct.
Control = Callable[[int, int, bytes], bytes]

# struct flock: type, whence, start, length, process, padding to the alignment of its offsets.
_FLOCK = struct.Struct("@hhqqi0q")
_USED = 100
_UNSHARED = 200

_CONSISTENT_READ = 0
_WRITE = 1
_RESIZE = 3

# Answers of a host, or of a file system, that has no such locks.
_NO_LOCKS = frozenset({errno.ENOLCK, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS})
# Answers where somebody holds a write lock, which no user of these rules takes.
_DENIED = frozenset({errno.EAGAIN, errno.EACCES})

# Seconds between attempts, each shortened at random: enough for others to say what they do.
_DELAYS = (0.002, 0.005, 0.01, 0.02)


class Role(Enum):
    """What a file is opened for.

    READER: nobody may change it meanwhile. WRITER: nor may anybody else write. SHARED: it is read
    whoever writes. CREATOR: its content, or the file itself, gives way to another."""

    READER = "read"
    WRITER = "written"
    SHARED = "shared"
    CREATOR = "replaced"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Terms:
    """What a role uses, and what it does not share; numbers of permissions."""

    uses: tuple[int, ...]
    unshared: tuple[int, ...] = ()

    @property
    def held(self) -> frozenset[int]:
        """The bytes that say so."""
        return frozenset(
            [*(_USED + one for one in self.uses), *(_UNSHARED + one for one in self.unshared)]
        )

    @property
    def contradicting(self) -> tuple[int, ...]:
        """The bytes that nobody else may hold, writers' first: they explain the most."""
        return (
            *(_USED + one for one in self.unshared),
            *(_UNSHARED + one for one in reversed(self.uses)),
        )


# As qemu's format drivers have it. Raw disks are guarded as well, which its tools leave to
# whoever uses the disk; and a creator, unlike theirs, also minds writers that share.
_TERMS = {
    Role.READER: _Terms(uses=(_CONSISTENT_READ,), unshared=(_WRITE, _RESIZE)),
    Role.WRITER: _Terms(uses=(_CONSISTENT_READ, _WRITE, _RESIZE), unshared=(_WRITE, _RESIZE)),
    Role.SHARED: _Terms(uses=(_CONSISTENT_READ,)),
    Role.CREATOR: _Terms(uses=(_WRITE, _RESIZE), unshared=(_WRITE, _RESIZE)),
}

_WRITERS = (_USED + _WRITE, _USED + _RESIZE)
_OTHERS = {
    **dict.fromkeys(_WRITERS, "is open for writing elsewhere"),
    _UNSHARED + _WRITE: "is open for reading elsewhere",
    _UNSHARED + _RESIZE: "is open for reading elsewhere",
    _UNSHARED + _CONSISTENT_READ: "is open elsewhere, by a user that lets nobody read it",
}


def acquire(
    file: int | FileStorage,
    role: Role,
    *,
    name: str,
    mode: LockMode = "auto",
    control: Control = fcntl.fcntl,
) -> FileLock:
    """Become a user of an open file, in `role`; closing the file ends it.

    file: a descriptor that can be read, or the storage over it; neither is taken over. name: for
    messages. Raises ImageBusy where another use of the file contradicts, StorageError where the
    host fails, or has no locks and `mode` is on."""
    lock = FileLock(file, name=name, mode=mode, control=control)
    lock.change(role)
    return lock


class FileLock:
    """What one open file description holds; made by `acquire`."""

    def __init__(
        self, file: int | FileStorage, *, name: str, mode: LockMode, control: Control
    ) -> None:
        """Nothing is held before `change`."""
        self._file = file
        self._name = name
        self._mode = mode
        self._control = control
        self._held: frozenset[int] = frozenset()
        self._role: Role | None = None

    @property
    def role(self) -> Role | None:
        """What the file was opened for; None once released."""
        return self._role

    @property
    def held(self) -> bool:
        """Whether others can see it: not with `off`, nor with `auto` on a host without locks."""
        return bool(self._held)

    def change(self, role: Role) -> None:
        """Take another role, for a reader that becomes a writer or the other way round.

        On the way nobody else can slip in. Raises as `acquire`; the old role is kept then."""
        if self._mode != "off":
            try:
                self._contend(role)
            except OSError as error:
                self._accept_refusal(error)
        self._role = role

    def release(self) -> None:
        """Give everything back before the file is closed. Nothing to do for one that is closed."""
        try:
            if self._descriptor() >= 0:
                self._keep(frozenset())
        except OSError as error:
            raise StorageError.wrap(error, operation="unlock", path=self._name) from error
        finally:
            self._held, self._role = frozenset(), None

    def _contend(self, role: Role) -> None:
        """Take the role, or raise ImageBusy after some attempts. Raises OSError."""
        conflict = self._attempt(role)
        for delay in _DELAYS:
            if conflict is None:
                return
            # Two that were started together must not meet again.
            time.sleep(delay * (1 + os.urandom(1)[0] / 256) / 2)
            conflict = self._attempt(role)
        if conflict is not None:
            raise ImageBusy(f"{self._name}: {_explain(conflict, role)}")

    def _attempt(self, role: Role) -> int | None:
        """Take the role; on failure the byte that contradicts, and all is as before."""
        # Who would fail anyway stays silent: others that start now are not disturbed.
        conflict = self._conflict(role)
        if conflict is not None:
            return conflict
        kept = self._held
        try:
            conflict = self._take(_TERMS[role].held)
            if conflict is None:
                conflict = self._conflict(role)
            if conflict is None:
                kept = _TERMS[role].held
        finally:
            self._keep(kept)
        return conflict

    def _conflict(self, role: Role) -> int | None:
        """The first byte held by others that this role cannot live with."""
        for byte in _TERMS[role].contradicting:
            answer = self._ask(fcntl.F_OFD_GETLK, fcntl.F_WRLCK, byte)
            if _FLOCK.unpack(answer)[0] != fcntl.F_UNLCK:
                return byte
        return None

    def _take(self, wanted: Iterable[int]) -> int | None:
        """Hold these bytes as well; a byte that somebody has locked for writing ends it."""
        for byte in sorted(set(wanted) - self._held):
            try:
                self._ask(fcntl.F_OFD_SETLK, fcntl.F_RDLCK, byte)
            except OSError as error:
                if error.errno not in _DENIED:
                    raise
                return byte
            self._held |= {byte}
        return None

    def _keep(self, kept: frozenset[int]) -> None:
        """Give all others back."""
        for byte in sorted(self._held - kept):
            self._ask(fcntl.F_OFD_SETLK, fcntl.F_UNLCK, byte)
            self._held -= {byte}

    def _ask(self, command: int, kind: int, byte: int) -> bytes:
        request = _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)
        descriptor = self._descriptor()
        if descriptor < 0:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return self._control(descriptor, command, request)

    def _descriptor(self) -> int:
        return self._file if isinstance(self._file, int) else self._file.fileno()

    def _accept_refusal(self, error: OSError) -> None:
        """Go on without locks where the host has none and the mode allows it."""
        if error.errno not in _NO_LOCKS:
            raise StorageError.wrap(error, operation="lock", path=self._name) from error
        if self._mode == "on":
            assert error.errno is not None, "an errno was just found in a set"
            raise StorageError(
                "lock",
                path=self._name,
                errno=error.errno,
                reason="the host has no locks for this file, and locking=on asks for them",
            ) from error


def _explain(byte: int, role: Role) -> str:
    """Which use of the file contradicts, and the way out."""
    found = _OTHERS.get(byte, "is locked elsewhere")
    if role is Role.READER and byte in _WRITERS:
        return f"{found} (see -U to read it all the same)"
    if role in (Role.READER, Role.SHARED):
        return found
    return f"{found}, so it cannot be {role.value} until it is closed there"
