"""What all steps of one repair have in common."""

from __future__ import annotations

import threading

import numpy as np

from qcowkit.codecs.qcow2.entries import Uint64Array
from qcowkit.codecs.qcow2.header import Header
from qcowkit.engine.barriers import Barriers
from qcowkit.engine.findings import Effort, FindingLog, Severity
from qcowkit.engine.qcow2.header_writer import HeaderWriter
from qcowkit.engine.qcow2.metadata import Qcow2Metadata
from qcowkit.engine.qcow2.references import Survey, survey
from qcowkit.engine.qcow2.repair_audit import Audit
from qcowkit.engine.repairs import ChangeKind, ChangeLog, Steps, StrictLog
from qcowkit.errors import OperationError
from qcowkit.storage.protocol import Storage
from qcowkit.units import SECTOR, KiB

_WORDS_A_SECTOR = SECTOR // 8
_MORE_EFFORT = 4
# All of the fixed part of any header: it has no more than a cluster.
_FIRST_BYTES = 2048 * KiB


class RepairRun:
    """The file, and who is told of what is done to it. Every walk has an effort of its own."""

    def __init__(
        self,
        storage: Storage,
        *,
        barriers: Barriers,
        changes: ChangeLog,
        steps: Steps,
        cancel: threading.Event | None,
        window_clusters: int,
    ) -> None:
        self.storage = storage
        self.barriers = barriers
        self.changes = changes
        self.steps = steps
        self.cancel = cancel
        self.window_clusters = window_clusters
        self._begun = False
        self._factor = 1

    def effort(self) -> Effort:
        """For the next walk over the tables. What the first one, a check, could afford is never too
        much for the others, which may read tables twice: none gives up half-way."""
        factor, self._factor = self._factor, _MORE_EFFORT
        return Effort(
            stored=self.storage.allocated(),
            factor=factor,
            progress=self.steps.next(),
            cancel=self.cancel,
        )

    def audit(self, metadata: Qcow2Metadata, *, last: bool = False) -> Audit:
        """Check the image as `metadata` describes it.

        last: nothing is repaired after it. Before that, counts that miss a table would take its
        clusters for free: OperationError where something cannot be read."""
        log, effort = FindingLog(), self.effort()
        found = survey(self.storage, metadata, log=log, effort=effort)
        audit = Audit(
            self.storage,
            metadata,
            found,
            log=log,
            effort=effort,
            window_clusters=self.window_clusters,
        )
        audit.run()
        count = log.count(Severity.ERROR)
        if count and not last:
            raise OperationError(
                "a repair needs to read all tables, and some cannot be read: "
                f"{count} error{'s' * (count != 1)}, the first: {log.kept[0]}"
            )
        return audit

    def survey(self, metadata: Qcow2Metadata, effort: Effort) -> Survey:
        """Everything down to the L2 tables, where nothing may fail any more."""
        return survey(self.storage, metadata, log=StrictLog(), effort=effort)

    def write(self, data: bytes, *, offset: int) -> None:
        """Bytes at a host offset; they are not durable before `wait`."""
        self._begin()
        self.storage.pwrite([data], offset=offset)

    def header_writer(self, metadata: Qcow2Metadata) -> HeaderWriter:
        """For one change of the header, which is not durable before `wait`."""
        self._begin()
        return HeaderWriter(self.storage, metadata.header)

    def _begin(self) -> None:
        """Before a write. The first one drops autoclear bits that nobody here knows: whoever set
        them relies on all that is written (row 11)."""
        self.barriers.check()
        if not self._begun:
            self._begun = True
            header = Header.decode(self.storage.pread(_FIRST_BYTES, offset=0))
            writer = HeaderWriter(self.storage, header)
            if writer.has_unknown_autoclear:
                self.barriers.pending = True
                writer.clear_unknown_autoclear()
                self.wait("unknown autoclear bits cleared")
                bits = header.autoclear_features ^ writer.header.autoclear_features
                self.changes.add(ChangeKind.AUTOCLEAR, f"header: bits {bits:#x}")
        self.barriers.pending = True

    def wait(self, name: str) -> None:
        """A barrier."""
        self.barriers.wait(f"repair: {name}")

    def write_words(self, before: Uint64Array, after: Uint64Array, *, offset: int) -> None:
        """The sectors in which two versions of a table differ, each in one write."""
        sectors = np.unique(np.flatnonzero(before != after) // _WORDS_A_SECTOR)
        if not len(sectors):
            return
        breaks = np.flatnonzero(np.diff(sectors) != 1) + 1
        for run in np.split(sectors, breaks):
            first, last = int(run[0]) * _WORDS_A_SECTOR, (int(run[-1]) + 1) * _WORDS_A_SECTOR
            self.write(after[first:last].astype(">u8").tobytes(), offset=offset + first * 8)
