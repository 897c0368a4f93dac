"""Gives memory of idle disks back: cached tables that nobody used for a while are dropped."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable
from typing import Protocol


class Cleanable(Protocol):
    """Something with a cache. `clean` drops what was not used since the last time."""

    def clean(self) -> None: ...


class CacheCleaner:
    """Calls `clean` of each image every `interval` seconds, from a thread of its own.

    It keeps no image alive, and ends with the last of them or with `stop`."""

    def __init__(self, images: Iterable[Cleanable], *, interval: float) -> None:
        self._images = weakref.WeakSet(images)
        self._interval = interval
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="qcowkit-cache-cleaner", daemon=True)

    def start(self) -> None:
        """Begin to wait for the first time."""
        self._thread.start()

    def tick(self) -> None:
        """Clean now, as each `interval` does."""
        for image in list(self._images):
            image.clean()

    def stop(self) -> None:
        """End, and wait for a cleaning under way."""
        self._stopped.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self._interval) and len(self._images):
            self.tick()
