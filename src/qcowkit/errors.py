"""Every error that leaves qcowkit, under one root. Floor 0: imports nothing of ours.

A message names the structure, the place, the value found and the value expected, in lower
case and without a full stop, so that a front end can print it as its one line."""

from __future__ import annotations

import errno as _errno
import os


class QcowkitError(Exception):
    """The root: whatever the library raises on purpose is one of these."""


class CorruptMetadata(QcowkitError):
    """A structure of an image contradicts its specification or the file it lies in.

    structure: the name of the table or header. host_offset: bytes from the start of the file, or
    None when the structure has no place of its own. index: the entry within a table."""

    def __init__(
        self,
        structure: str,
        *,
        reason: str,
        host_offset: int | None = None,
        index: int | None = None,
    ) -> None:
        self.structure = structure
        self.reason = reason
        self.host_offset = host_offset
        self.index = index
        place = structure
        if host_offset is not None:
            place += f" at host offset {host_offset:#x}"
        if index is not None:
            place += f", entry {index}"
        super().__init__(f"{place}: {reason}")


class UnsupportedFeature(QcowkitError):
    """Something is needed that cannot be done; `bit` is set for header bits."""

    def __init__(self, name: str, *, reason: str, bit: int | None = None) -> None:
        self.name = name
        self.reason = reason
        self.bit = bit
        super().__init__(f"{name}: {reason}")


class UnknownFormat(QcowkitError):
    """The content is not an image of the format that was asked for, or of none that is known."""


class BudgetExceeded(QcowkitError):
    """An image asks for more than the caller allows. Raised before anything is allocated."""

    def __init__(self, what: str, *, value: int, limit: int) -> None:
        self.what = what
        self.value = value
        self.limit = limit
        super().__init__(f"{what}: {value} is above the limit of {limit}")


class ReferenceDenied(QcowkitError):
    """A name inside an image was not admitted; the text does not tell whether the file exists."""


class StorageError(QcowkitError):
    """The host failed: `errno` is kept, `path` and `operation` say where."""

    def __init__(self, operation: str, *, path: str, errno: int, reason: str | None = None) -> None:
        self.operation = operation
        self.path = path
        self.errno = errno
        text = reason or os.strerror(errno)
        super().__init__(f"{path}: {operation}: {text} ({_errno.errorcode.get(errno, errno)})")

    @classmethod
    def wrap(cls, error: OSError, *, operation: str, path: str) -> StorageError:
        """The same failure with its operation and path; a missing errno becomes EIO."""
        return cls(operation, path=path, errno=error.errno or _errno.EIO)


class RequestError(QcowkitError):
    """The caller asked for something outside the disk or against the rules of an option."""


class ImageBusy(QcowkitError):
    """Another process holds the image in a way that excludes this use."""


class OperationError(QcowkitError):
    """An operation could not be carried out, or came to a negative verdict."""


class Cancelled(QcowkitError):
    """The caller withdrew the operation; nothing appears under a final name."""
