"""Host clusters: what is given out, what waits in quarantine, and how refcounts grow with it."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np
import pytest

from qcowkit.engine.options import OpenOptions
from qcowkit.engine.qcow2.allocator import NEVER, Allocator
from qcowkit.errors import CorruptMetadata, RequestError
from qcowkit.units import KiB, MiB
from tests.engine.qcow2_rig import Rig

pytestmark = pytest.mark.pinned("counts of clusters")

SIZE = 512


class Bench:
    """The allocator of an image of small clusters, and an account of who owns what."""

    def __init__(self, **spec: Any) -> None:
        self.rig = Rig(**{"cluster_bits": 9, "size": 64 * KiB, **spec})
        self.allocator = self.rig.state.allocator
        self.store = self.rig.state.refcounts
        self.owned = Counter(dict(enumerate(self.rig.stored_counts())))
        self._blocks = self._structures()

    def _structures(self) -> set[int]:
        """Clusters of refcount blocks and of the refcount table."""
        blocks = {word >> 9 for word in self.store.table if word}
        first = self.store.place >> 9
        return blocks | set(range(first, first + self.store.clusters))

    def own(self, first: int, count: int = 1) -> None:
        self.owned.update(range(first, first + count))

    def disown(self, first: int, count: int = 1) -> None:
        self.owned.subtract(range(first, first + count))

    def audit(self) -> None:
        """Every count is that of the account, blocks and table among them."""
        self.allocator.apply_raised()
        if self.allocator.quarantined:
            self.allocator.release()
        now = self._structures()
        self.owned.update(now - self._blocks)
        self.owned.subtract(self._blocks - now)
        self._blocks = now
        last = max(cluster for cluster, count in self.owned.items() if count)
        counts = self.store.counts_of(np.arange(last + 200)).tolist()
        assert counts == [self.owned[cluster] for cluster in range(last + 200)]
        assert self.store.last_in_use() == last


# Giving out.


def test_clusters_come_one_behind_the_other() -> None:
    bench = Bench()
    grants = [bench.allocator.allocate(1).first for _ in range(50)]
    assert grants == list(range(grants[0], grants[0] + 50))


def test_a_grant_ends_where_the_free_run_does() -> None:
    bench = Bench(clusters=dict.fromkeys(range(6), b"x"))
    first = bench.rig.host(0) // SIZE
    for cluster in (first, first + 1, first + 4):
        bench.allocator.free(cluster, 1, punch=False)
    bench.allocator.release()
    grants = [bench.allocator.allocate(8) for _ in range(2)]
    assert [(grant.first, grant.count) for grant in grants] == [(first, 2), (first + 4, 1)]


def test_what_is_given_out_counts_once_it_is_applied() -> None:
    bench = Bench()
    first = bench.allocator.allocate(3).first
    assert bench.store.counts_of(np.arange(first, first + 3)).tolist() == [0, 0, 0]
    assert bench.allocator.pending
    bench.allocator.apply_raised()
    assert bench.store.counts_of(np.arange(first, first + 3)).tolist() == [1, 1, 1]
    assert not bench.allocator.pending


def test_a_cluster_behind_the_file_reads_as_zeros_and_one_inside_may_hold_anything() -> None:
    bench = Bench(clusters={0: b"x", 1: b"y"})
    inside = bench.rig.host(0) // SIZE
    bench.allocator.free(inside, 1, punch=False)
    bench.allocator.release()
    grants = [bench.allocator.allocate(1) for _ in range(2)]
    assert [grant.zero for grant in grants] == [False, True]
    assert grants[0].first == inside
    assert grants[1].first * SIZE >= bench.rig.memory.size()


def test_a_cluster_is_fresh_only_once() -> None:
    bench = Bench()
    grant = bench.allocator.allocate(2)
    assert grant.zero
    bench.allocator.free(grant.first, 2, punch=True)
    bench.allocator.apply_raised()
    bench.allocator.release()
    again = Allocator(bench.store, bench.rig.state.guard, file_clusters=grant.first + 2)
    assert again.allocate(1).first == grant.first
    while not (again.allocate(1)).zero:
        pass
    bench.allocator.cut(grant.first)
    first = bench.allocator.allocate(1)
    assert first.zero


def test_nothing_reads_as_zeros_on_a_device() -> None:
    bench = Bench()
    allocator = Allocator(bench.store, bench.rig.state.guard, file_clusters=NEVER)
    assert not allocator.allocate(5).zero
    assert allocator.take_fresh() == -1


def test_the_quick_way_gives_out_what_the_usual_one_would() -> None:
    quick, usual = Bench(refcount_order=6), Bench(refcount_order=6)
    taken = []
    for _ in range(300):
        cluster = quick.allocator.take_fresh()
        taken.append(cluster if cluster >= 0 else quick.allocator.allocate(1).first)
    assert taken == [usual.allocator.allocate(1).first for _ in range(300)]
    for bench in (quick, usual):
        for cluster in taken:
            bench.own(cluster)
        bench.audit()
    assert quick.allocator.end_of_grants == usual.allocator.end_of_grants


# Quarantine.


@pytest.mark.parametrize("punch", [False, True])
def test_a_freed_cluster_is_not_given_out_before_it_is_released(punch: bool) -> None:
    bench = Bench(clusters=dict.fromkeys(range(40), b"x"))
    freed = [bench.rig.host(index * SIZE) // SIZE for index in range(40)]
    for cluster in freed:
        bench.allocator.free(cluster, 1, punch=punch)
    assert {bench.allocator.allocate(1).first for _ in range(200)}.isdisjoint(freed)
    bench.allocator.apply_raised()
    assert {bench.allocator.allocate(1).first for _ in range(200)}.isdisjoint(freed)
    bench.allocator.apply_raised()
    released = bench.allocator.release()
    assert sum(count for _, count, _ in released) == 40
    assert {wish for *_, wish in released} == {punch}
    assert bench.allocator.quarantined == 0
    bench.allocator._next = bench.allocator._limit
    assert bench.allocator.allocate(1).first == min(freed)


@pytest.mark.pinned("shared host clusters", "refcount_bits=1")
def test_only_what_nobody_refers_to_any_more_is_released() -> None:
    bench = Bench(clusters={0: b"x", 1: b"y"})
    shared = bench.rig.host(0) // SIZE
    bench.store.add(shared, 1, 1)
    bench.allocator.free(shared, 2, punch=True)
    assert bench.allocator.release() == [(shared + 1, 1, True)]
    assert bench.store.count(shared) == 1


def test_many_scattered_clusters_are_released_as_few_long_runs_are() -> None:
    bench = Bench(size=256 * KiB, clusters=dict.fromkeys(range(400), b"x"))
    hosts = [bench.rig.host(index * SIZE) // SIZE for index in range(400)]
    gone = sorted(random.Random(3).sample(hosts, 150))
    for cluster in gone:
        bench.allocator.free(cluster, 1, punch=cluster % 3 == 0)
        bench.disown(cluster)
    released = bench.allocator.release()
    found = {
        cluster: punch
        for first, count, punch in released
        for cluster in range(first, first + count)
    }
    assert found == {cluster: cluster % 3 == 0 for cluster in gone}
    bench.audit()


def test_a_cluster_that_is_freed_twice_and_counts_once_is_corruption() -> None:
    bench = Bench(clusters={0: b"x"})
    cluster = bench.rig.host(0) // SIZE
    bench.allocator.free(cluster, 1, punch=False)
    bench.allocator.free(cluster, 1, punch=False)
    with pytest.raises(CorruptMetadata, match=r"refcount \d of the cluster at 0x\w+ cannot change"):
        bench.allocator.release()


def test_clusters_that_were_given_out_and_freed_again_come_back() -> None:
    bench = Bench()
    first = bench.allocator.allocate(5).first
    bench.allocator.free(first, 5, punch=False)
    bench.audit()
    bench.allocator._next = bench.allocator._limit
    assert bench.allocator.allocate(1).first == first


# Growth.


@pytest.mark.parametrize("order", range(7))
def test_refcounts_grow_with_the_file_over_many_blocks(order: int) -> None:
    """S002-03: every width."""
    bench = Bench(refcount_order=order)
    per_block = bench.store.per_block
    steps = random.Random(order)
    while bench.allocator.end_of_grants < 5 * per_block:
        grant = bench.allocator.allocate(steps.choice((1, per_block // 3, per_block)))
        bench.own(grant.first, grant.count)
    bench.audit()
    assert sum(word != 0 for word in bench.store.table) == 5


@pytest.mark.parametrize("order", [4, 5, 6])
def test_a_block_describes_itself_where_it_lies_in_what_it_describes(order: int) -> None:
    bench = Bench(refcount_order=order)
    per_block = bench.store.per_block
    while bench.allocator.end_of_grants < 4 * per_block:
        bench.allocator.allocate(per_block)
    for index in range(1, 4):
        assert bench.store.table[index] >> 9 == index * per_block


@pytest.mark.parametrize("start", range(120, 136))
@pytest.mark.parametrize("count", [1, 2, 60, 62, 63, 64, 65, 130])
def test_a_run_at_any_distance_from_a_boundary_brings_its_own_blocks(
    start: int, count: int
) -> None:
    """S003-25."""
    bench = Bench(refcount_order=6)
    while bench.allocator.end_of_grants < start:
        bench.own(bench.allocator.allocate(1).first)
    first = bench.allocator.allocate_run(count)
    bench.own(first, count)
    assert first >= start
    bench.audit()
    grant = bench.allocator.allocate(1)
    assert not first <= grant.first < first + count
    bench.own(grant.first)
    bench.audit()


@pytest.mark.parametrize("order", range(7))
def test_a_refcount_table_that_is_full_moves_into_an_area_that_describes_itself(
    order: int,
) -> None:
    """S003-25: at every width, and at every distance from the last entry of the table."""
    per_block = 4096 >> order
    whole = 64 * per_block
    for rest in (0, 1, 2, 3, per_block - 1) if order > 2 else (1,):
        bench = Bench(refcount_order=order)
        place = bench.store.place
        first = bench.allocator.allocate_run(whole - 200 - per_block)
        bench.own(first, whole - 200 - per_block)
        while bench.allocator._tail() < whole - rest:
            bench.own(bench.allocator.allocate_run(1))
        assert bench.store.place == place
        for _ in range(rest + 2):
            bench.own(bench.allocator.allocate_run(1))
        assert bench.store.place != place
        assert bench.store.clusters >= 2
        bench.audit()


def test_a_guest_that_fills_the_file_crosses_all_boundaries() -> None:
    for order in (4, 5, 6):
        rig = Rig(cluster_bits=9, size=20 * MiB, refcount_order=order)
        before = rig.metadata.header.refcount_table_clusters
        length = (4096 >> order) * 64 * SIZE + 40 * KiB
        content = random.Random(order).randbytes(length)
        for offset in range(0, length, 100 * KiB + 512):
            part = content[offset : offset + 100 * KiB + 512]
            rig.chain.write(part, offset=offset)
        rig.chain.flush()
        assert rig.reopened().header.refcount_table_clusters > before
        assert rig.read(0, length) == content
        rig.assert_clean()


def test_a_file_that_needs_more_blocks_than_a_table_can_have_is_refused() -> None:
    bench = Bench()
    assert bench.store.plan_entries(1) == 64
    assert bench.store.plan_entries(1 << 20) == 1 << 20
    with pytest.raises(RequestError, match="the image would need 1048577 refcount blocks"):
        bench.store.plan_entries((1 << 20) + 1)


def test_a_count_above_its_width_is_corruption() -> None:
    bench = Bench(refcount_order=1)
    cluster = bench.allocator.allocate(1).first
    bench.allocator.apply_raised()
    bench.store.add(cluster, 1, 1)
    bench.store.add(cluster, 1, 1)
    with pytest.raises(CorruptMetadata, match="refcount 3 of the cluster at .* change by 1"):
        bench.store.add(cluster, 1, 1)
    assert bench.store.count(cluster) == 3


def test_a_cluster_without_a_block_cannot_be_counted() -> None:
    bench = Bench()
    with pytest.raises(CorruptMetadata, match=r"entry 1: no refcount block, expected one"):
        bench.store.add(bench.store.per_block + 5, 1, -1)


def test_a_refcount_table_entry_that_is_no_cluster_is_corruption() -> None:
    rig = Rig(cluster_bits=9, size=64 * KiB)
    rig.state.refcounts.table[0] |= 0x8
    with pytest.raises(CorruptMetadata, match=r"refcount block offset 0x\w+8 is not a multiple"):
        rig.chain.write(b"x", offset=0)


def test_full_blocks_are_not_read_again() -> None:
    """S002-09."""
    clusters = dict.fromkeys(range(1000), b"x")
    tight = OpenOptions(refcount_cache_size=0)
    rig = Rig(cluster_bits=9, refcount_order=6, size=MiB, clusters=clusters, options=tight)
    blocks = [word for word in rig.state.refcounts.table if word]
    rig.state.allocator.allocate(1)
    assert {call.offset for call in rig.file.of("pread")} >= set(blocks[:-1])
    rig.forget()
    for _ in range(200):
        rig.state.allocator.allocate(1)
        rig.state.allocator.apply_raised()
        rig.state.refcounts.store_blocks()
    read = {call.offset for call in rig.file.of("pread")}
    assert read & set(blocks[:-2]) == set()


def test_a_full_block_is_looked_at_again_once_something_is_freed_there() -> None:
    rig = Rig(cluster_bits=9, refcount_order=6, size=MiB, clusters=dict.fromkeys(range(1000), b"x"))
    host = rig.host(100 * SIZE) // SIZE
    allocator = rig.state.allocator
    allocator.allocate(1)
    allocator.free(host, 1, punch=False)
    allocator.apply_raised()
    allocator.release()
    allocator._next = allocator._limit
    assert allocator.allocate(1).first == host


# Compressed bytes.


@pytest.mark.pinned("shared host clusters", "refcount_bits=1")
def test_compressed_bytes_are_packed_until_a_cluster_is_full() -> None:
    bench = Bench()
    places = [bench.allocator.allocate_bytes(200) for _ in range(5)]
    assert [place - places[0] for place in places] == [0, 200, 400, 600, 800]
    for place in places:
        for cluster in range(place // SIZE, (place + 199) // SIZE + 1):
            bench.own(cluster)
    bench.audit()


@pytest.mark.pinned("shared host clusters", "refcount_bits=1")
def test_compressed_bytes_cross_into_the_next_cluster_only_if_it_is_the_next() -> None:
    bench = Bench()
    first = bench.allocator.allocate_bytes(300)
    bench.allocator.allocate(1)
    assert bench.allocator.allocate_bytes(300) % SIZE == 0
    assert bench.allocator.allocate_bytes(300) // SIZE == first // SIZE + 2


@pytest.mark.pinned("shared host clusters", "refcount_bits=1")
def test_what_fits_exactly_leaves_nothing_to_pack_into() -> None:
    bench = Bench()
    first = bench.allocator.allocate_bytes(312)
    assert bench.allocator.allocate_bytes(200) == first + 312
    assert bench.allocator.allocate_bytes(1) % SIZE == 0


def test_one_bit_of_refcount_gives_every_compressed_cluster_its_own() -> None:
    bench = Bench(refcount_order=0)
    places = [bench.allocator.allocate_bytes(10) for _ in range(4)]
    assert all(place % SIZE == 0 for place in places)
    for place in places:
        bench.own(place // SIZE)
    bench.audit()


def test_the_last_count_is_never_exceeded_by_packing() -> None:
    bench = Bench(refcount_order=1)
    places = [bench.allocator.allocate_bytes(10) for _ in range(7)]
    owners = Counter(place // SIZE for place in places)
    assert sorted(owners.values()) == [1, 3, 3]
    bench.allocator.apply_raised()


@pytest.mark.pinned("shared host clusters", "refcount_bits=1")
@pytest.mark.parametrize("freed", ["the cluster of the cursor", "another"])
def test_the_cursor_goes_with_its_cluster(freed: str) -> None:
    bench = Bench()
    place = bench.allocator.allocate_bytes(100)
    other = bench.allocator.allocate(1).first
    victim = other if freed == "another" else place // SIZE
    bench.allocator.free(victim, 1, punch=False)
    following = bench.allocator.allocate_bytes(100)
    assert (following == place + 100) == (freed == "another")


# The end of the file.


def test_the_end_of_use_counts_what_was_given_out() -> None:
    bench = Bench()
    before = bench.allocator.end_of_use()
    grant = bench.allocator.allocate(3)
    assert bench.allocator.end_of_use() == grant.first + 3 > before


def test_empty_blocks_at_the_end_are_taken_off_the_table() -> None:
    bench = Bench(refcount_order=6)
    grants = [bench.allocator.allocate(64) for _ in range(8)]
    used = bench.store.last_used
    for grant in grants[2:]:
        bench.allocator.free(grant.first, grant.count, punch=False)
    bench.allocator.apply_raised()
    bench.allocator.release()
    dropped = bench.store.drop_empty_tail()
    kept = bench.store.last_used
    assert [index for index, _ in dropped] == list(range(used, kept, -1))
    assert not any(bench.store.table[kept + 1 :])
    assert bench.store.last_in_use() >= grants[1].first


def test_the_header_is_never_given_out() -> None:
    bench = Bench()
    bench.store.add(0, 1, -1)
    with pytest.raises(CorruptMetadata, match="the cluster of the header counts as free"):
        bench.allocator.allocate(1)
