"""What every host cluster of a sound image is used for, found by the walk that a check makes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from qcowkit.engine.findings import Effort, FindingLog, Severity
from qcowkit.engine.qcow2.counters import Window
from qcowkit.engine.qcow2.metadata import Qcow2Metadata
from qcowkit.engine.qcow2.recount import Recount
from qcowkit.engine.qcow2.references import survey
from qcowkit.errors import OperationError, RequestError
from qcowkit.storage.protocol import Storage

BoolArray = npt.NDArray[np.bool_]
# Structures that never move; all others are data, or tables that are written anew.
_FIXED = ("header", "crypto header", "bitmap directory")
_REFCOUNTS = ("refcount table", "refcount block")
_FIXED_BITMAPS = ("table of bitmap", "data of bitmap")


@dataclass(frozen=True, slots=True, kw_only=True)
class Census:
    """Host clusters of the file, bool, shape (n,): those that anything refers to, those that guest
    data lie in, and those of structures that stay where they are.

    counts: how many of the others hold refcounts. packed: active clusters that are compressed."""

    used: BoolArray
    data: BoolArray
    fixed: BoolArray
    counts: int
    packed: int

    @property
    def tables(self) -> int:
        """Clusters of tables, without refcounts."""
        return int(np.count_nonzero(self.used & ~self.data & ~self.fixed)) - self.counts

    def up_to(self, end: int) -> Census:
        """The same where nothing from host cluster `end` on is used."""
        return replace(self, used=self.used[:end], data=self.data[:end], fixed=self.fixed[:end])


def take_census(storage: Storage, metadata: Qcow2Metadata, *, effort: Effort) -> Census:
    """Walk all references. Raises RequestError where a check would find corruptions: what nothing
    seems to refer to is written over by those who ask; OperationError where something cannot be
    read, or the image is too complex."""
    log = FindingLog(limit=1)
    found = survey(storage, metadata, log=log, effort=effort)
    walk = _Walk(storage, metadata, found, log=log, effort=effort)
    walk.run()
    if log.count(Severity.ERROR):
        raise OperationError(f"not all tables can be read: {log.kept[0]}")
    if log.count(Severity.CORRUPTION):
        raise RequestError(f"the image has to be repaired first (check -r all): {log.kept[0]}")
    return walk.census()


class _Walk(Recount):
    """Remembers which clusters are used."""

    def run(self) -> None:
        """As a check does; windows without a reference stay unused."""
        self._used = np.zeros(self.end, dtype=np.bool_)
        super().run()

    def see_window(self, window: Window, *, first: bool) -> None:
        """Judge the counts, and keep which are not 0."""
        super().see_window(window, first=first)
        self._used[window.base : window.base + window.size] = window.computed != 0

    def census(self) -> Census:
        """What was found."""
        data, fixed = self._used.copy(), np.zeros(self.end, dtype=np.bool_)
        claims = self.found.claims
        names = claims.names
        stays = [one in _FIXED or one.startswith(_FIXED_BITMAPS) for one in names]
        for clusters, owners in claims.clusters(0, self.end):
            data[clusters] = False
            fixed[clusters] |= np.array(stays, dtype=np.bool_)[owners]
        counting = np.array([names[index] in _REFCOUNTS for index in claims.owner.tolist()])
        counts = int(claims.count[counting].sum())
        data[self.found.tables.offset >> self.bits] = False
        return Census(
            used=self._used,
            data=data,
            fixed=fixed,
            counts=counts,
            packed=self.statistics.compressed,
        )
