"""All targets by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import cast

from fuzz.targets import (
    allocation,
    bitmaps,
    clusters,
    extensions,
    header,
    l2_map,
    luks,
    options,
    qcow2_image,
    refcount_blocks,
    snapshots,
    vhd_bat,
    vhd_footer,
    vhd_header,
    vhd_image,
    vhd_locators,
)

CORPUS = Path(__file__).resolve().parent / "corpus"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A decoder under test. run: takes any bytes; only a QcowkitError may leave it."""

    name: str
    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]

    def corpus(self) -> list[bytes]:
        """The seeds, then every input that is kept as a file of hexadecimal text."""
        files = sorted((CORPUS / self.name).glob("*.hex"))
        kept = [bytes.fromhex(path.read_text(encoding="ascii")) for path in files]
        return [*self.seeds(), *kept]


def _target(module: ModuleType) -> Target:
    name = module.__name__.rpartition(".")[2]
    return Target(
        name=name,
        run=cast(Callable[[bytes], None], module.target),
        seeds=cast(Callable[[], list[bytes]], module.seeds),
    )


TARGETS = {
    target.name: target
    for target in map(
        _target,
        (
            allocation,
            bitmaps,
            clusters,
            extensions,
            header,
            l2_map,
            luks,
            options,
            qcow2_image,
            refcount_blocks,
            snapshots,
            vhd_bat,
            vhd_footer,
            vhd_header,
            vhd_image,
            vhd_locators,
        ),
    )
}
