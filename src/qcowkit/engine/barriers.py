"""Barriers: nothing that is written after one can be durable before what was written ahead of it.

Each has a name, so that a test can leave a single one out and show that the loss is noticed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from qcowkit.errors import StorageError

if TYPE_CHECKING:
    from qcowkit.storage.protocol import Storage

Observer = Callable[[str], None]


def ignore_event(name: str) -> None:
    """The observer of those who do not want to know."""


class Barriers:
    """The flushes of one image. Once one has failed every later one fails too: the host may have
    dropped what it could not write, and says so only once."""

    def __init__(self, *storages: Storage, observe: Observer = ignore_event) -> None:
        """storages: the image's file, then its data file if that is another. observe: told of
        each barrier and each step by name, before it happens."""
        self._storages = storages
        self._failure: StorageError | None = None
        self.observe = observe
        # Whether anything was written since the last barrier; writers set it.
        self.pending = False

    @property
    def failed(self) -> bool:
        """Whether a barrier has failed, after which nothing can be promised any more."""
        return self._failure is not None

    def wait(self, name: str) -> None:
        """Flush what was written; nothing is done where nothing was. Raises StorageError."""
        self.check()
        if not self.pending:
            return
        self.observe(name)
        try:
            for storage in self._storages:
                storage.flush()
        except StorageError as error:
            self._failure = error
            raise
        self.pending = False

    def check(self) -> None:
        """Raise StorageError where a barrier has failed before."""
        failure = self._failure
        if failure is not None:
            raise StorageError(
                "flush",
                path=failure.path,
                errno=failure.errno,
                reason="an earlier flush failed, nothing written since can be promised: close "
                "the image and check it",
            )
