"""Zeroing and discarding guest ranges of a qcow2 image, by the table of states.

docs/formats/qcow2.md has the table. Zeros are written only where entries cannot say them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from qcowkit.codecs.qcow2.entries import Uint64Array
from qcowkit.codecs.qcow2.transitions import (
    EraseRules,
    erase,
    erase_subclusters,
    hosts_of,
    is_compressed,
    put_entries,
    slice_columns,
)
from qcowkit.engine.qcow2.old_content import OldContent
from qcowkit.engine.qcow2.state import WriteState
from qcowkit.engine.qcow2.write import Writer
from qcowkit.errors import UnsupportedFeature
from qcowkit.extents.ranges import RangeSet
from qcowkit.extents.table import Hit
from qcowkit.units import MiB, align_down, align_up

_ZEROS = memoryview(bytes(MiB))


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroPlan:
    """How a range is zeroed: `begin` to `end` by entries, the ragged ends as data. Guest bytes.

    begin and end are multiples of the subcluster size, or the end of the disk."""

    begin: int
    end: int
    written: tuple[tuple[int, int], ...]


class Eraser:
    """Zeroes and discards of one image. The caller holds the lock."""

    def __init__(self, state: WriteState, writer: Writer, old: OldContent) -> None:
        self._state = state
        self._writer = writer
        self._old = old
        self._geometry = state.geometry
        self._size = state.geometry.cluster_size

    @property
    def _passes_down(self) -> bool:
        options = self._state.options
        wish = options.pass_discard_request
        return options.discard if wish is None else wish

    def rules(self, *, zeroes: bool = False, unmap: bool = False, full: bool = False) -> EraseRules:
        """How clusters are erased in this image now."""
        return EraseRules(
            version=self._state.header.header.version,
            has_base=self._old.below is not None,
            external=self._state.external,
            zeroes=zeroes,
            unmap=unmap,
            keep=self._state.options.discard_no_unref,
            full=full,
        )

    # Discard

    def discard(self, offset: int, length: int) -> None:
        """Give up the whole clusters of a range; the end of the disk ends a whole cluster."""
        rules = self.rules()
        if not rules.possible:
            # Over a base, version 2 could only uncover what lies below: a discard may do nothing.
            return
        begin, stop = align_up(offset, self._size), offset + length
        end = stop if stop == self._state.mapping.size else align_down(stop, self._size)
        if begin < end:
            self._zero_raw_data(begin, end, unmap=True)
            self.erase(begin, align_up(end, self._size), rules)

    # Zeroes

    def write_zeroes(self, offset: int, length: int, *, unmap: bool, fallback: bool) -> None:
        """The range reads as zeros. Raises UnsupportedFeature without `fallback` where zeros would
        have to be written; nothing is changed then."""
        if not length:
            return
        rules = self.rules(zeroes=True, unmap=unmap)
        plan = self._plan(offset, offset + length, rules)
        if plan.written and not fallback:
            start, end = plan.written[0]
            raise UnsupportedFeature(
                "zeroing without writing",
                reason=f"guest bytes {start:#x} to {end:#x} can only be zeroed by writing zeros",
            )
        if not fallback:
            self._refuse_compressed_parts(plan.begin, plan.end)
        if plan.begin < plan.end:
            self._zero_raw_data(plan.begin, min(plan.end, self._state.mapping.size), unmap=unmap)
            self._zero_by_entries(plan.begin, plan.end, rules)
        for start, end in plan.written:
            self._write_zeros(start, end)

    def _plan(self, start: int, stop: int, rules: EraseRules) -> ZeroPlan:
        if not rules.possible:
            return ZeroPlan(begin=start, end=start, written=((start, stop),))
        unit = self._geometry.subcluster_size if rules.version >= 3 else self._size
        size = self._state.mapping.size
        begin, end = align_up(start, unit), align_down(stop, unit)
        if stop == size:
            # Behind the disk nothing has to stay: where there is a whole unit, so is the cluster.
            end = align_up(stop, self._size if begin < stop else unit)
        if begin > end:
            # Within one unit, and touching neither of its ends.
            low = align_down(start, unit)
            if self._rest_is_zero(low, start) and self._rest_is_zero(stop, low + unit):
                return ZeroPlan(begin=low, end=low + unit, written=())
            return ZeroPlan(begin=start, end=start, written=((start, stop),))
        written = []
        if start < begin:
            if self._rest_is_zero(begin - unit, start):
                begin -= unit
            else:
                written.append((start, min(begin, stop)))
        if end < stop:
            if self._rest_is_zero(stop, end + unit):
                end += unit
            else:
                written.append((max(end, start), stop))
        return ZeroPlan(begin=begin, end=end, written=tuple(written))

    def _rest_is_zero(self, start: int, stop: int) -> bool:
        stop = min(stop, self._state.mapping.size)
        return start >= stop or self._old.is_zero(start, stop)

    def _refuse_compressed_parts(self, begin: int, end: int) -> None:
        """Raise UnsupportedFeature where a part of a compressed cluster is to be zeroed."""
        for edge in {begin, end} - {align_down(begin, self._size), align_down(end, self._size)}:
            cluster = align_down(edge, self._size)
            if self._state.mapping.lookup(cluster)[0] == Hit.OTHER:
                raise UnsupportedFeature(
                    "zeroing without writing",
                    reason=f"a part of the compressed cluster at guest offset {cluster:#x} cannot "
                    "be zeroed by its entry",
                )

    def _zero_by_entries(self, begin: int, end: int, rules: EraseRules) -> None:
        """Whole clusters by their entries, ragged ones by their subclusters."""
        first, last = align_up(begin, self._size), align_down(end, self._size)
        if first > last:
            self._zero_part(begin, end)
            return
        if begin < first:
            self._zero_part(begin, first)
        if first < last:
            self.erase(first, last, rules)
        if last < end:
            self._zero_part(last, end)

    def _zero_part(self, begin: int, end: int) -> None:
        """Subclusters of one cluster: bits alone change, no space is given up."""
        state, geometry = self._state, self._geometry
        cluster = begin >> geometry.cluster_bits
        number, index = divmod(cluster, state.tables.slice_entries)
        state.ensure_table(number // state.tables.slices_per_table)
        words = state.slice(number)
        if is_compressed(words[2 * index]):
            self._write_zeros(begin, min(end, state.mapping.size))
            return
        start = cluster << geometry.cluster_bits
        first = (begin - start) // geometry.subcluster_size
        last = (end - 1 - start) // geometry.subcluster_size
        bitmap = erase_subclusters(words[2 * index + 1], first=first, last=last)
        if bitmap != words[2 * index + 1]:
            state.edit(number, first=index, last=index + 1)[2 * index + 1] = bitmap
        state.settle()

    def _write_zeros(self, start: int, stop: int) -> None:
        while start < stop:
            count = min(len(_ZEROS), stop - start)
            self._writer.write(_ZEROS[:count], offset=start)
            start += count

    def _zero_raw_data(self, begin: int, end: int, *, unmap: bool) -> None:
        """A raw data file is the disk by itself, so it has the zeros first."""
        state = self._state
        if state.metadata.data_file_raw:
            state.barriers.pending = True
            state.data.zero(offset=begin, length=end - begin, unmap=unmap)

    # Entries

    def erase(self, begin: int, end: int, rules: EraseRules) -> None:
        """Change the entries of whole clusters. begin, end: multiples of the cluster size."""
        span = self._state.tables.slice_entries * self._size
        for low, high in self._mapped(begin, end, rules):
            position = low
            while position < high:
                stop = min(high, align_down(position, span) + span)
                self._erase_in_slice(position, stop, rules)
                self._state.settle()
                position = stop

    def _mapped(self, begin: int, end: int, rules: EraseRules) -> Iterator[tuple[int, int]]:
        """The parts of a range whose entries have to be looked at: where nothing is mapped and
        nothing shows through, nothing has to be said."""
        state, coverage = self._state, self._geometry.l2_coverage
        everywhere = (rules.zeroes and rules.version >= 3) or (rules.has_base and not rules.full)
        if everywhere:
            yield begin, end
            return
        first, last = begin // coverage, (end - 1) // coverage + 1
        used = np.flatnonzero(hosts_of(state.tables.l1[first:last])) + first
        tables = RangeSet.of(used * coverage, (used + 1) * coverage)
        for start, stop in zip(tables.start.tolist(), tables.stop.tolist(), strict=True):
            yield max(start, begin), min(stop, end)

    def _erase_in_slice(self, begin: int, end: int, rules: EraseRules) -> None:
        state, bits = self._state, self._geometry.cluster_bits
        number, first = divmod(begin >> bits, state.tables.slice_entries)
        last = first + ((end - begin) >> bits)
        state.ensure_table(number // state.tables.slices_per_table)
        entries, bitmaps = slice_columns(state.slice(number), geometry=self._geometry)
        after = entries[first:last].copy()
        masks = None if bitmaps is None else bitmaps[first:last].copy()
        old, held = erase(after, masks, rules)
        lost = hosts_of(after[held])
        same = np.array_equal(after, entries[first:last])
        if bitmaps is not None and masks is not None:
            same = same and np.array_equal(masks, bitmaps[first:last])
        if same:
            return
        words = state.edit(number, first=first, last=last)
        put_entries(words, first=first, entries=after, bitmaps=masks)
        self._let_go(old, lost.tolist() if rules.keep else [], rules)

    def _let_go(self, old: Uint64Array, kept: list[int], rules: EraseRules) -> None:
        """Free what entries referred to, and tell the host of what is no longer needed."""
        state = self._state
        passes = state.options.pass_discard_snapshot if rules.full else self._passes_down
        if rules.zeroes and not rules.unmap:
            passes = False
        self._writer.give_up(old, punch=passes)
        if not passes:
            return
        # What stays allocated may be hollow at once: a discarded range reads as zeros or as before.
        if state.external and not state.metadata.data_file_raw:
            kept = hosts_of(old).tolist()
        for host in kept:
            state.data.discard(offset=host, length=self._size)
            state.barriers.pending = True
