"""Which disk a session works on, and the temporary overlay that leaves it alone."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from qcowkit.budget import TRUSTED
from qcowkit.engine.options import DEFAULT_OPTIONS
from qcowkit.errors import RequestError
from qcowkit.image.chain import Chain
from qcowkit.image.gate import ReferenceGate
from qcowkit.image.lineage import close_layers, open_layers
from qcowkit.image.registry import build_writable
from qcowkit.operations.create import CreateOptions, create_image

CACHE_MODES = ("none", "writeback", "writethrough", "directsync", "unsafe")
DISCARD_MODES = {"ignore": False, "off": False, "unmap": True, "on": True}
AIO_MODES = ("threads", "native", "io_uring")


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenRequest:
    """What is to be opened, and how.

    path: None where the options name it. options: by their names, `driver` and `file.filename`
    among them. writable: False for -r. temporary: changes go to an overlay that is lost.
    copy_on_read: what is read from below is stored. described: the path is a description (a list
    of options) itself."""

    path: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    writable: bool = True
    cache: str = "writeback"
    temporary: bool = False
    copy_on_read: bool = False
    force_share: bool = False
    described: bool = False

    def check(self) -> None:
        """Raise RequestError for what contradicts itself or is no known word."""
        if self.cache not in CACHE_MODES:
            expected = ", ".join(CACHE_MODES)
            raise RequestError(f"cache mode is {self.cache!r}, expected one of {expected}")
        if not self.writable:
            for given, flag in ((self.temporary, "-s"), (self.copy_on_read, "-C")):
                if given:
                    raise RequestError(f"{flag} needs an image that is written, -r excludes that")

    @property
    def writethrough(self) -> bool:
        """Whether every change is to be durable at once."""
        return self.cache in ("writethrough", "directsync")

    @property
    def passes_discards(self) -> bool:
        """Whether discards do anything. Other words than those known are left to the opener."""
        return DISCARD_MODES.get(self.options.get("discard", "unmap"), True)


class Opener(Protocol):
    """How a front end reads options and opens disks for a session."""

    def parse(self, text: str) -> dict[str, str]:
        """Options of one text, `a=1,b=2`. Raises RequestError."""

    def check(self, request: OpenRequest) -> None:
        """Raise RequestError for options that could not be used, without opening anything."""

    def open(self, request: OpenRequest) -> Chain:
        """The disk, for writing if `request.writable` and not `temporary`. Raises QcowkitError."""


def temporary_overlay(base: Chain) -> Chain:
    """A writable disk over `base`, which it takes over: it is closed with it, also on failure.

    The overlay is a qcow2 file in the directory for temporary files, without a name from the start,
    so nothing is left of it whatever happens. Raises StorageError."""
    try:
        with tempfile.TemporaryDirectory(prefix="qcow-io-") as folder:
            path = Path(folder, "overlay.qcow2")
            options = CreateOptions.of("qcow2", {"size": base.size})
            create_image(path, options, gate=ReferenceGate.deny_all())
            layers = open_layers(
                path, format="qcow2", gate=ReferenceGate.deny_all(), budget=TRUSTED, writable=True
            )
        try:
            top = build_writable(layers[0], budget=TRUSTED, options=DEFAULT_OPTIONS)
            return Chain([top, *base.images], layers=(*layers, *base.layers), top=top)
        except BaseException:
            close_layers(layers)
            raise
    except BaseException:
        base.close()
        raise
