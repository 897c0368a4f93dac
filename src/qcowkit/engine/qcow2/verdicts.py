"""What is wrong with the counts of a window of host clusters, written into a log. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from qcowkit.engine.findings import MAX_FINDINGS, Finding, FindingLog, Severity
from qcowkit.engine.qcow2.claims import Claims
from qcowkit.engine.qcow2.counters import SATURATED, Window
from qcowkit.engine.qcow2.l2_audit import Links, Reporter
from qcowkit.engine.qcow2.references import L1Links, TableSet
from qcowkit.extents.table import Int64Array

IndexArray = npt.NDArray[np.intp]
_ALL_BITS = (1 << 64) - 1


def entry_reporter(log: FindingLog, tables: TableSet, *, per_table: int) -> Reporter:
    """Writes faults of L2 entries; their indices count through all the tables of a batch."""

    def report(where: Int64Array, values: Int64Array, text: str) -> None:
        def make(number: int) -> Finding:
            reason = text.format(int(values[number]) & _ALL_BITS)
            return _of_entry(tables, int(where[number]), per_table, reason)

        log.add_many(Severity.CORRUPTION, len(where), make)

    return report


def report_copied(
    log: FindingLog,
    tables: TableSet,
    links: Links,
    wrong: IndexArray,
    counts: npt.NDArray[Any] | None,
    *,
    per_table: int,
) -> None:
    """COPIED flags of L2 entries that contradict the refcount.

    wrong: indices into the links. counts: the refcounts of these, None with a data file."""

    def make(number: int) -> Finding:
        link = int(wrong[number])
        reason = _copied_reason(
            f"the data cluster at {int(links.host[link]):#x}",
            copied=bool(links.copied[link]),
            count=None if counts is None else int(counts[number]),
        )
        return _of_entry(tables, int(links.where[link]), per_table, reason)

    log.add_many(Severity.CORRUPTION, len(wrong), make)


def check_l1_flags(
    log: FindingLog, window: Window, links: L1Links, *, bits: int, host_offset: int
) -> None:
    """COPIED flags of the active L1 table, as far as its L2 tables lie in the window."""
    clusters = links.offset >> bits
    mask = window.inside(clusters)
    index = np.arange(len(clusters)) if mask is None else np.flatnonzero(mask)
    stored = window.stored_of(clusters[index])
    wrong = np.flatnonzero((stored == 1) != links.copied[index])

    def make(number: int) -> Finding:
        link = int(index[wrong[number]])
        return Finding(
            severity=Severity.CORRUPTION,
            structure="L1 table",
            host_offset=host_offset,
            index=int(links.index[link]),
            reason=_copied_reason(
                f"the L2 table at {int(links.offset[link]):#x}",
                copied=bool(links.copied[link]),
                count=int(stored[wrong[number]]),
            ),
        )

    log.add_many(Severity.CORRUPTION, len(wrong), make)


def compare_counts(
    log: FindingLog, window: Window, *, bits: int, file_clusters: int, cut: Int64Array
) -> None:
    """Stored against computed counts: more is a leak, less is a corruption.

    cut: clusters behind the end of the file that entries refer to; those entries are reported
    already, and the refcounts belong to them."""
    wrong = np.flatnonzero(window.stored != window.computed)
    if len(wrong) and len(cut):
        wrong = wrong[~np.isin(wrong + window.base, cut)]
    if not len(wrong):
        return
    more = window.stored[wrong] > window.computed[wrong]
    for severity, index in (
        (Severity.CORRUPTION, wrong[~more]),
        (Severity.LEAK, wrong[more]),
    ):
        _report_counts(log, window, index, severity, bits=bits, file_clusters=file_clusters)


def _report_counts(
    log: FindingLog,
    window: Window,
    index: IndexArray,
    severity: Severity,
    *,
    bits: int,
    file_clusters: int,
) -> None:
    def make(number: int) -> Finding:
        place = int(index[number])
        cluster = window.base + place
        beyond = "; it lies beyond the end of the file" if cluster >= file_clusters else ""
        return Finding(
            severity=severity,
            structure="cluster",
            host_offset=cluster << bits,
            reason=f"refcount is {int(window.stored[place])}, expected "
            f"{int(window.computed[place])} from its references{beyond}",
        )

    log.add_many(severity, len(index), make)


def check_shared(
    log: FindingLog, window: Window, claims: Claims, tables: TableSet, *, bits: int
) -> None:
    """Clusters that two structures use, whatever their refcount says.

    Tables and data may be shared by snapshots; a table with data, and compressed data with plain
    ones, may not."""
    for clusters, owner in claims.clusters(window.base, window.base + window.size):
        computed = window.computed_of(clusters)
        shared = np.flatnonzero(computed > 1)
        names = [claims.names[one] for one in owner[shared][:MAX_FINDINGS].tolist()]
        _report_shared(log, clusters[shared], computed[shared] - 1, names, bits=bits)
    own, weight = tables.offset >> bits, tables.weight
    mask = window.inside(own)
    if mask is not None:
        own, weight = own[mask], weight[mask]
    more = window.computed_of(own) - np.minimum(weight, SATURATED)
    shared = np.flatnonzero(more > 0)
    names = ["L2 table"] * min(len(shared), MAX_FINDINGS)
    _report_shared(log, own[shared], more[shared], names, bits=bits)
    if window.packed is not None:
        mixed = np.flatnonzero((window.packed > 0) & (window.packed != window.computed))
        extra = window.computed[mixed].astype(np.int64) - window.packed[mixed]
        names = ["compressed data"] * min(len(mixed), MAX_FINDINGS)
        _report_shared(log, mixed + window.base, extra, names, bits=bits)


def _report_shared(
    log: FindingLog, clusters: Int64Array, extra: Int64Array, names: Sequence[str], *, bits: int
) -> None:
    def make(number: int) -> Finding:
        count = int(extra[number])
        others = "1 other reference uses" if count == 1 else f"{count} other references use"
        return Finding(
            severity=Severity.CORRUPTION,
            structure=names[number],
            host_offset=int(clusters[number]) << bits,
            reason=f"{others} the same cluster",
        )

    log.add_many(Severity.CORRUPTION, len(clusters), make)


def _of_entry(tables: TableSet, where: int, per_table: int, reason: str) -> Finding:
    table, index = divmod(where, per_table)
    return Finding(
        severity=Severity.CORRUPTION,
        structure="L2 table",
        host_offset=int(tables.offset[table]),
        index=index,
        reason=reason,
    )


def _copied_reason(what: str, *, copied: bool, count: int | None) -> str:
    state = "set" if copied else "clear"
    if count is None:
        return f"COPIED is {state} for {what} of an external data file, expected set"
    expected = "set" if count == 1 else "clear"
    return f"COPIED is {state} for {what} with refcount {count}, expected {expected}"
