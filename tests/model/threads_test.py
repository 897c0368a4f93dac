"""Several threads at one disk: no byte of another address, nothing torn, nothing lost.

Each sector says which request wrote it. What a reader may find there follows from when requests
began and ended. docs/adr/0010; seed 001-20."""

from __future__ import annotations

import itertools
import random
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from qcowkit.engine.options import OpenOptions
from qcowkit.errors import RequestError
from qcowkit.image.chain import Chain
from qcowkit.image.gate import ReferenceGate
from qcowkit.image.registry import open_chain
from qcowkit.operations.check import Verdict, check_image, open_for_check
from qcowkit.operations.create import CreateOptions, create_image
from qcowkit.testing.stamps import FOREIGN, make_stamps, read_stamps
from qcowkit.units import SECTOR, KiB
from tests.model.kinds import ModelKind

Values = npt.NDArray[np.int64]

WRITERS, READERS = 4, 2
REQUESTS, LONG_REQUESTS = 120, 4000
# A cache of two slices: commits, and with them releases, come with nearly every request.
TIGHT = OpenOptions(
    l2_cache_size=1 * KiB, l2_cache_entry_size=512, refcount_cache_size=0, discard=True
)

KINDS = {
    kind.name: kind
    for kind in (
        ModelKind(
            name="clusters of 512",
            size=96 * KiB,
            capacity=96 * KiB,
            options={"cluster_size": 512},
            open_options=TIGHT,
        ),
        ModelKind(
            name="clusters of 2 KiB",
            size=192 * KiB,
            capacity=192 * KiB,
            options={"cluster_size": 2 * KiB},
            open_options=TIGHT,
        ),
        ModelKind(
            name="subclusters",
            size=512 * KiB,
            capacity=512 * KiB,
            options={"cluster_size": 16 * KiB, "extended_l2": True},
            open_options=TIGHT,
        ),
        ModelKind(
            name="lazy refcounts",
            size=96 * KiB,
            capacity=96 * KiB,
            options={"cluster_size": 1 * KiB, "lazy_refcounts": True},
            open_options=TIGHT,
        ),
        ModelKind(
            name="data file",
            size=96 * KiB,
            capacity=96 * KiB,
            options={"cluster_size": 1 * KiB},
            data_file=True,
            open_options=TIGHT,
        ),
        ModelKind(
            name="default caches",
            size=512 * KiB,
            capacity=512 * KiB,
            options={"cluster_size": 4096},
        ),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Sectors [start, stop) got a value, 0 for zeros, at some moment from `begun` to `ended`."""

    start: int
    stop: int
    value: int
    begun: int
    ended: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What a reader found from sector `start` on."""

    start: int
    values: Values
    begun: int
    ended: int


@dataclass(slots=True, kw_only=True)
class Record:
    """What all threads did, in no order."""

    sectors: int
    changes: list[Change] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)

    def judge(self, look: Look) -> list[str]:
        """Sectors of a look that no order of the requests can explain."""
        last = np.zeros(self.sectors, np.int64)
        for change in sorted(self.changes, key=lambda one: one.begun):
            # What was over before the reader began hides all that was over before it began.
            if change.ended < look.begun:
                last[change.start : change.stop] = change.begun
        allowed = np.zeros(self.sectors, bool)
        found = np.zeros(self.sectors, np.int64)
        found[look.start : look.start + len(look.values)] = look.values
        # The disk was made of zeros.
        allowed[:] = (found == 0) & (last == 0)
        for change in self.changes:
            if change.begun < look.ended:
                part = slice(change.start, change.stop)
                live = change.ended >= last[part]
                allowed[part] |= live & (found[part] == change.value)
        allowed[: look.start] = True
        allowed[look.start + len(look.values) :] = True
        return [f"sector {sector} holds {found[sector]}" for sector in np.flatnonzero(~allowed)]


class Crowd:
    """Threads at one disk, with one clock."""

    def __init__(self, chain: Chain, kind: ModelKind, *, seed: int, requests: int) -> None:
        self.chain = chain
        self.kind = kind
        self.record = Record(sectors=kind.size // SECTOR)
        self._seed, self._requests = seed, requests
        self._clock = itertools.count(1)
        self._values = itertools.count(1)
        # Even values can be compressed.
        self._even = itertools.count(1 << 40, 2)
        self._ended: list[int] = []
        self._failures: list[BaseException] = []

    def run(self) -> None:
        """Let all threads end; the first failure of one is raised."""
        threads = [
            threading.Thread(target=self._guarded, args=(task, number))
            for task, count in ((self._write, WRITERS), (self._read, READERS))
            for number in range(count)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._failures:
            raise self._failures[0]

    def _guarded(self, task: Callable[[random.Random], None], number: int) -> None:
        try:
            task(random.Random(self._seed * 100 + number + (50 if task == self._read else 0)))
        except BaseException as error:
            self._failures.append(error)
        finally:
            if task == self._write:
                self._ended.append(number)

    def _range(self, noise: random.Random) -> tuple[int, int]:
        """Sectors; writers crowd in the first quarter of the disk."""
        count = self.record.sectors
        if noise.random() < 0.5:
            count //= 4
        length = noise.choice((1, 1, 3, 8, 40))
        start = noise.randrange(count)
        return start, min(self.record.sectors, start + length)

    def _write(self, noise: random.Random) -> None:
        for _ in range(self._requests):
            start, stop = self._range(noise)
            choice = noise.random()
            if choice < 0.55:
                self._change(start, stop, next(self._values))
            elif choice < 0.65:
                self._compress(start, stop, next(self._even))
            elif choice < 0.8:
                self._erase(start, stop, unmap=noise.random() < 0.5)
            elif choice < 0.93:
                self._discard(start, stop)
            else:
                self.chain.flush()

    def _note(self, start: int, stop: int, value: int, act: Callable[[], None]) -> None:
        begun = next(self._clock)
        act()
        ended = next(self._clock)
        change = Change(start=start, stop=stop, value=value, begun=begun, ended=ended)
        self.record.changes.append(change)

    def _change(self, start: int, stop: int, value: int) -> None:
        data = make_stamps(first=start, count=stop - start, value=value)
        self._note(start, stop, value, lambda: self.chain.write(data, offset=start * SECTOR))

    def _compress(self, start: int, stop: int, value: int) -> None:
        start, stop = self._clusters(start, stop + self.kind.cluster_size // SECTOR)
        data = make_stamps(first=start, count=stop - start, value=value)
        act = self.chain.write_compressed
        try:
            self._note(start, stop, value, lambda: act(data, offset=start * SECTOR))
        except RequestError:
            # Allocated already: then nothing was changed.
            return

    def _erase(self, start: int, stop: int, *, unmap: bool) -> None:
        offset, length = start * SECTOR, (stop - start) * SECTOR
        erase = self.chain.write_zeroes
        self._note(start, stop, 0, lambda: erase(offset=offset, length=length, unmap=unmap))

    def _discard(self, start: int, stop: int) -> None:
        """Of a discard only whole clusters become zeros."""
        offset, length = start * SECTOR, (stop - start) * SECTOR
        per_cluster = self.kind.cluster_size // SECTOR
        begin = start + -start % per_cluster
        end = stop if stop == self.record.sectors else stop - stop % per_cluster
        discard = self.chain.discard
        self._note(begin, max(begin, end), 0, lambda: discard(offset=offset, length=length))

    def _clusters(self, start: int, stop: int) -> tuple[int, int]:
        per_cluster = self.kind.cluster_size // SECTOR
        start -= start % per_cluster
        return start, max(min(stop - stop % per_cluster, self.record.sectors), start)

    def _read(self, noise: random.Random) -> None:
        while len(self._ended) < WRITERS:
            start, stop = self._range(noise)
            self.look(start, stop)

    def look(self, start: int, stop: int) -> None:
        """Read sectors, and note when."""
        begun = next(self._clock)
        content = self.chain.read(offset=start * SECTOR, length=(stop - start) * SECTOR)
        ended = next(self._clock)
        values = read_stamps(content, first=start)
        assert not (values == FOREIGN).any(), f"sectors {start} + {np.flatnonzero(values < 0)}"
        self.record.looks.append(Look(start=start, values=values, begun=begun, ended=ended))


@pytest.fixture(autouse=True)
def _restless() -> Iterator[None]:
    """Threads take turns as often as the interpreter can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def run_crowd(kind: ModelKind, *, seed: int, requests: int) -> None:
    files = kind.make()
    with kind.open(files) as chain:
        crowd = Crowd(chain, kind, seed=seed, requests=requests)
        crowd.run()
        crowd.look(0, crowd.record.sectors)
        chain.flush()
        crowd.look(0, crowd.record.sectors)
    with kind.open(files, writable=False) as crowd.chain:
        crowd.look(0, crowd.record.sectors)
    faults = [text for look in crowd.record.looks for text in crowd.record.judge(look)]
    assert faults == []
    result = check_image(open_for_check(files.image, format="qcow2"))
    assert result.verdict is Verdict.CLEAN, "\n".join(result.render())


@pytest.mark.parametrize("name", KINDS)
def test_overlapping_requests_never_show_what_nobody_wrote_there(name: str) -> None:
    run_crowd(KINDS[name], seed=1, requests=REQUESTS)


@pytest.mark.soak
@pytest.mark.parametrize("name", KINDS)
def test_overlapping_requests_go_on_showing_what_was_written(name: str) -> None:
    for seed in range(10):
        run_crowd(KINDS[name], seed=10 + seed, requests=LONG_REQUESTS // 10)


def own_sectors(chain: Chain, *, number: int, sectors: int, expected: Values) -> None:
    """One thread writes every fourth sector only: its neighbours in each cluster are others'."""
    noise = random.Random(number)
    for round in range(1, 60):
        sector = noise.randrange(sectors // WRITERS) * WRITERS + number
        offset = sector * SECTOR
        if noise.random() < 0.2:
            chain.write_zeroes(offset=offset, length=SECTOR)
            expected[sector] = 0
        else:
            value = round * WRITERS + number
            chain.write(make_stamps(first=sector, count=1, value=value), offset=offset)
            expected[sector] = value
        if noise.random() < 0.1:
            chain.flush()
        found = read_stamps(chain.read(offset=offset, length=SECTOR), first=sector)
        assert found.tolist() == [expected[sector]]


@pytest.mark.parametrize("options", [{"cluster_size": 4096}, {"extended_l2": True}])
def test_neighbours_in_one_cluster_do_not_disturb_one_another(
    tmp_path: Path, options: dict[str, int | bool]
) -> None:
    path = tmp_path / "disk"
    size = 256 * KiB
    create_image(
        path,
        CreateOptions(format="qcow2", values={**options, "size": size}),
        gate=ReferenceGate.deny_all(),
    )
    expected = np.zeros(size // SECTOR, np.int64)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            own_sectors(chain, number=number, sectors=len(expected), expected=expected)
        except BaseException as error:
            failures.append(error)

    with open_chain(path, format="qcow2", writable=True, options=TIGHT) as chain:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(WRITERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []
    with open_chain(path, format="qcow2") as chain:
        assert read_stamps(chain.read(offset=0, length=size)).tolist() == expected.tolist()
    layer = open_for_check(path)
    assert check_image(layer).verdict is Verdict.CLEAN
    layer.storage.close()
