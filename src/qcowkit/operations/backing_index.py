"""Which files are which disks: an index of GUIDs in a small SQLite database (seed 002-12).

It is a hint and nothing more. Whoever asks it opens what it names through the reference gate and
looks at the GUID again (`find_backing`), so that an index that is stale, shared or forged can hide
a file but never choose one."""

from __future__ import annotations

import os
import sqlite3
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EIO
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Self
from uuid import UUID

from qcowkit.errors import OperationError, StorageError
from qcowkit.image.metadata import load_guid
from qcowkit.storage.file import FileStorage

# "qkid", as the extension is called.
_APPLICATION = 0x716B6964
_VERSION = 1
_TABLES = (
    "CREATE TABLE files (folder BLOB NOT NULL, name BLOB NOT NULL, guid BLOB, "
    "size INTEGER NOT NULL, mtime INTEGER NOT NULL, device INTEGER NOT NULL, "
    "inode INTEGER NOT NULL, PRIMARY KEY (folder, name)) WITHOUT ROWID",
    "CREATE INDEX by_guid ON files (guid) WHERE guid IS NOT NULL",
    f"PRAGMA application_id = {_APPLICATION}",
    f"PRAGMA user_version = {_VERSION}",
)
# A file can change again within the clock tick of its last change: it is read once more then.
_SETTLED = 2_000_000_000
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanLimits:
    """entries: files and directories looked at. depth: directories below one that is scanned."""

    entries: int = 200_000
    depth: int = 32


DEFAULT_LIMITS = ScanLimits()


@dataclass(frozen=True, slots=True, kw_only=True)
class Scanned:
    """What a scan came to. read: files that were opened, being new or changed. complete: False
    where a limit ended it. unreadable: files and directories that could not be looked into."""

    files: int
    read: int
    unreadable: int
    complete: bool


class _Stamp(NamedTuple):
    """By what a file is taken for unchanged. mtime: nanoseconds."""

    size: int
    mtime: int
    device: int
    inode: int


@dataclass(slots=True, kw_only=True)
class _Tally:
    """The state of one scan."""

    left: int
    depth: int
    files: int = 0
    read: int = 0
    unreadable: int = 0
    complete: bool = True


class BackingIndex:
    """An open index; for one thread. All methods raise StorageError where the database fails."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open the index at `path`, or make it; its directory must be there.

        Raises OperationError for a database of another program or version."""
        self.path = os.fsdecode(path)
        with self._failing():
            self._db = sqlite3.connect(self.path)
        try:
            with self._failing():
                self._prepare()
        except BaseException:
            self._db.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the database back."""
        self._db.close()

    def scan(
        self, directories: Iterable[str | os.PathLike[str]], *, limits: ScanLimits = DEFAULT_LIMITS
    ) -> Scanned:
        """Look at every regular file below some directories. No symbolic link is followed below
        them, and files that have not changed since they were last read are not read again.

        limits: for all directories together. Raises StorageError for a directory that cannot be
        opened."""
        tally = _Tally(left=limits.entries, depth=limits.depth)
        for directory in directories:
            root = os.path.realpath(directory)
            try:
                descriptor = os.open(root, _FOLDER)
            except OSError as error:
                raise StorageError.wrap(error, operation="scan", path=root) from error
            try:
                seen = {
                    self._scan_folder(folder, opened, entries, tally)
                    for folder, opened, entries in _iter_folders(root, descriptor, tally)
                }
            finally:
                os.close(descriptor)
            if tally.complete:
                self._forget_folders(root, seen)
        return Scanned(
            files=tally.files,
            read=tally.read,
            unreadable=tally.unreadable,
            complete=tally.complete,
        )

    def find(self, guid: UUID) -> tuple[Path, ...]:
        """Where files were that said that they are this disk, when they were last looked at."""
        with self._failing():
            rows = self._db.execute(
                "SELECT folder, name FROM files WHERE guid = ? ORDER BY folder, name", (guid.bytes,)
            ).fetchall()
        # Whoever may write into the index may have put anything there.
        return tuple(
            Path(os.fsdecode(folder), os.fsdecode(name))
            for folder, name in rows
            if isinstance(folder, bytes) and isinstance(name, bytes)
        )

    def _prepare(self) -> None:
        self._db.execute("PRAGMA trusted_schema = OFF")
        if not any(self._kind()):
            with self._db:
                self._db.execute("BEGIN IMMEDIATE")
                # Another process may have been faster.
                if not any(self._kind()):
                    for statement in _TABLES:
                        self._db.execute(statement)
        application, version, _ = self._kind()
        if (application, version) != (_APPLICATION, _VERSION):
            found = f"application {application:#x}, version {version}"
            raise OperationError(
                f"{self.path}: the database is of {found}, expected {_APPLICATION:#x}, "
                f"version {_VERSION}: delete it or name another --index"
            )

    def _kind(self) -> tuple[int, int, int]:
        """Whose database it is, of which version, and how many tables and indexes it has."""
        (application,) = self._db.execute("PRAGMA application_id").fetchone()
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        (tables,) = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        return application, version, tables

    def _scan_folder(
        self, folder: str, descriptor: int, entries: list[os.DirEntry[str]], tally: _Tally
    ) -> bytes:
        """Bring what is known of one directory up to date; the name under which it is known."""
        key = os.fsencode(folder)
        known = self._load_folder(key)
        rows: list[tuple[object, ...]] = []
        for entry in entries:
            name = os.fsencode(entry.name)
            status = _regular(entry)
            if status is None:
                continue
            tally.files += 1
            stamp = _stamp(status)
            if known.pop(name, None) == stamp:
                continue
            tally.read += 1
            try:
                guid = _read_guid(descriptor, entry.name, os.path.join(folder, entry.name))
            except StorageError:
                tally.unreadable += 1
                known[name] = stamp
                continue
            if time.time_ns() - stamp.mtime < _SETTLED:
                # No file has such a size: the next scan reads it again.
                stamp = stamp._replace(size=-1)
            rows.append((key, name, None if guid is None else guid.bytes, *stamp))
        gone = [(key, name) for name in known]
        with self._failing(), self._db:
            self._db.executemany("DELETE FROM files WHERE folder = ? AND name = ?", gone)
            self._db.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        return key

    def _load_folder(self, folder: bytes) -> dict[bytes, _Stamp]:
        with self._failing():
            rows = self._db.execute(
                "SELECT name, size, mtime, device, inode FROM files WHERE folder = ?", (folder,)
            ).fetchall()
        return {name: _Stamp(*stamp) for name, *stamp in rows}

    def _forget_folders(self, root: str, seen: set[bytes]) -> None:
        """Drop the directories below `root` that are not there any more."""
        below = os.fsencode(root).rstrip(b"/") + b"/"
        with self._failing(), self._db:
            rows = self._db.execute("SELECT DISTINCT folder FROM files").fetchall()
            gone = [
                (folder,)
                for (folder,) in rows
                if isinstance(folder, bytes) and folder.startswith(below) and folder not in seen
            ]
            self._db.executemany("DELETE FROM files WHERE folder = ?", gone)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StorageError("index", path=self.path, errno=EIO, reason=str(error)) from error


def _iter_folders(
    folder: str, descriptor: int, tally: _Tally, *, depth: int = 0
) -> Iterator[tuple[str, int, list[os.DirEntry[str]]]]:
    """A directory and all below it, each with a descriptor that is open until the next is asked
    for, so that nothing that is renamed or replaced meanwhile leads elsewhere."""
    try:
        with os.scandir(descriptor) as found:
            entries = sorted(islice(found, tally.left + 1), key=lambda entry: entry.name)
    except OSError:
        tally.unreadable += 1
        return
    if len(entries) > tally.left:
        tally.complete = False
        entries = entries[: tally.left]
    tally.left -= len(entries)
    yield folder, descriptor, entries
    for entry in entries:
        if not entry.is_dir(follow_symlinks=False):
            continue
        if depth == tally.depth:
            tally.complete = False
            return
        try:
            child = os.open(entry.name, _FOLDER, dir_fd=descriptor)
        except OSError:
            tally.unreadable += 1
            continue
        try:
            path = os.path.join(folder, entry.name)
            yield from _iter_folders(path, child, tally, depth=depth + 1)
        finally:
            os.close(child)


def _regular(entry: os.DirEntry[str]) -> os.stat_result | None:
    """The status of a regular file; None for everything else, and for what is gone by now."""
    try:
        status = entry.stat(follow_symlinks=False)
    except OSError:
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def _read_guid(descriptor: int, name: str, path: str) -> UUID | None:
    storage = FileStorage.open(name, follow=False, devices=False, dir_fd=descriptor, name=path)
    with storage:
        return load_guid(storage)


def _stamp(status: os.stat_result) -> _Stamp:
    return _Stamp(
        size=status.st_size,
        mtime=status.st_mtime_ns,
        device=_signed(status.st_dev),
        inode=_signed(status.st_ino),
    )


def _signed(word: int) -> int:
    """An unsigned 64-bit number as the database can hold it."""
    return word - (1 << 64) if word >> 63 else word
