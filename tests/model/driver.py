"""One disk beside one array of bytes: every request goes to both, and both must stay equal."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from qcowkit.errors import RequestError, UnsupportedFeature
from qcowkit.operations.check import Verdict, check_image, open_for_check
from qcowkit.testing.model_disk import ModelDisk
from qcowkit.units import SECTOR, align_down, align_up
from tests.model.kinds import SNAPSHOT, ModelKind

# Requests that are remembered for the message of a failure.
_REMEMBERED = 30


class Driver:
    """Makes requests and compares. Every method fails with AssertionError where the two differ.

    steps: how many requests were made. sound: none of them has failed. Whatever is refused must
    have changed nothing."""

    def __init__(self, kind: ModelKind) -> None:
        self.kind = kind
        self.files = kind.make()
        self.model = ModelDisk(kind.size, backing=kind.initial())
        self.chain = kind.open(self.files)
        self.steps = 0
        self.sound = True
        self.history: deque[str] = deque(maxlen=_REMEMBERED)

    @property
    def size(self) -> int:
        return self.model.size

    @contextmanager
    def _step(self, text: str) -> Iterator[None]:
        self.steps += 1
        self.history.append(text)
        self.sound = False
        yield
        self.sound = True

    # Requests

    def write(self, *, offset: int, length: int, seed: int) -> None:
        with self._step(f"write({offset=}, {length=}, {seed=})"):
            data = make_content(length, seed)
            self.chain.write(data, offset=offset)
            self.model.write(data, offset=offset)

    def write_compressed(self, *, offset: int, length: int, seed: int, discard: bool) -> None:
        """Whole clusters that cover the range. discard: make room for them first."""
        size = self.kind.cluster_size
        offset = align_down(offset, size)
        stop = min(self.size, align_up(offset + length, size))
        with self._step(
            f"write_compressed({offset=}, length={stop - offset}, {seed=}, {discard=})"
        ):
            data = make_content(stop - offset, seed)
            if discard:
                self._discard(offset=offset, length=stop - offset)
            try:
                self.chain.write_compressed(data, offset=offset)
            except RequestError:
                assert not (discard and self._discard_makes_room()), "a discarded range is refused"
            else:
                assert self.files.data is None
                assert self.kind.secret is None
                self.model.write(data, offset=offset)

    def _discard_makes_room(self) -> bool:
        kind = self.kind
        erases = kind.version >= 3 or kind.base is None
        if kind.data_file or kind.secret is not None:
            return False
        return erases and not kind.open_options.discard_no_unref

    def write_zeroes(self, *, offset: int, length: int, unmap: bool, fallback: bool) -> None:
        with self._step(f"write_zeroes({offset=}, {length=}, {unmap=}, {fallback=})"):
            try:
                self.chain.write_zeroes(
                    offset=offset, length=length, unmap=unmap, fallback=fallback
                )
            except UnsupportedFeature:
                assert not fallback
                assert length
                self._compare(offset=offset, length=length)
            else:
                self.model.write_zeroes(offset=offset, length=length)

    def discard(self, *, offset: int, length: int) -> None:
        with self._step(f"discard({offset=}, {length=})"):
            self._discard(offset=offset, length=length)

    def _discard(self, *, offset: int, length: int) -> None:
        self.chain.discard(offset=offset, length=length)
        if self.kind.version < 3 and self.kind.base is not None:
            return
        size = self.kind.cluster_size
        begin, stop = align_up(offset, size), offset + length
        end = stop if stop == self.size else align_down(stop, size)
        if begin < end:
            self.model.write_zeroes(offset=begin, length=end - begin)

    def resize(self, size: int, *, preallocation: str = "off") -> None:
        size = min(align_down(size, SECTOR), self.kind.capacity)
        with self._step(f"resize({size}, {preallocation=})"):
            before = self.size
            try:
                self.chain.resize(size, shrink=True, preallocation=preallocation)
            except RequestError:
                assert self._refuses(size, preallocation)
                assert self.chain.size == before
            else:
                assert not self._refuses(size, preallocation)
                self.model.resize(size)
                assert self.chain.size == size

    def _refuses(self, size: int, preallocation: str) -> bool:
        kind = self.kind
        if size < self.size:
            return preallocation != "off" or (kind.has_snapshot and kind.version < 3)
        hides = kind.base is not None and not kind.extended
        noise = kind.secret is not None and kind.version < 3
        return preallocation != "off" and (hides or noise)

    def read(self, *, offset: int, length: int) -> None:
        with self._step(f"read({offset=}, {length=})"):
            self._compare(offset=offset, length=length)

    def clean(self) -> None:
        """The caches forget what was not used of late."""
        with self._step("clean()"):
            self.chain.images[0].disk.clean()  # type: ignore[attr-defined]

    def flush(self) -> None:
        with self._step("flush()"):
            self.chain.flush()
            self.check()

    def reopen(self) -> None:
        with self._step("reopen()"):
            self.close()
            self.chain = self.kind.open(self.files)

    # Judgements

    def check(self) -> None:
        """Whole disk, metadata and snapshot are as they should be. To be asked after a flush."""
        self._agree(self.chain.read(offset=0, length=self.size), 0)
        self._judge_file(closed=False)

    def close(self) -> None:
        """Close; whoever opens the file next finds the same."""
        self.chain.close()
        self._judge_file(closed=True)
        with self.kind.open(self.files, writable=False) as chain:
            assert chain.size == self.size
            self._agree(chain.read(offset=0, length=chain.size), 0)

    def _judge_file(self, *, closed: bool) -> None:
        kind = self.kind
        if closed or not kind.lazy:
            result = check_image(open_for_check(self.files.image, format="qcow2"))
            assert result.verdict is Verdict.CLEAN, "\n".join(result.render())
            assert result.notes == ()
        if kind.has_snapshot:
            with kind.open(self.files, writable=False, snapshot=SNAPSHOT) as chain:
                assert chain.read(offset=0, length=chain.size) == kind.initial()
        if kind.raw_data and self.files.data is not None:
            self._agree(self.files.data.to_bytes(), 0)

    def _compare(self, *, offset: int, length: int) -> None:
        self._agree(self.chain.read(offset=offset, length=length), offset)

    def _agree(self, content: bytes, offset: int) -> None:
        at = self.model.find_difference(content, offset=offset)
        assert at is None, f"guest offset {at:#x} of {self.size:#x} differs"


def make_content(length: int, seed: int) -> bytes:
    """Bytes of a guest: noise, or text that compresses well, or zeros now and then."""
    noise = random.Random(seed)
    if seed % 8 == 7:
        return bytes(length)
    if seed % 2:
        return noise.randbytes(length)
    return (noise.randbytes(24) * (length // 24 + 1))[:length]


def place_range(
    driver: Driver, *, place: int, extent: int, scale: int, unit: int
) -> tuple[int, int]:
    """(offset, length) within the disk. place, extent: 0 to 0xffff, shares of the disk and of what
    `scale` allows: 0 a cluster, 1 some clusters, 2 half of the disk. unit: what the range is
    aligned to, 0 to 3 for bytes, sectors, subclusters, clusters."""
    size, cluster = driver.size, driver.kind.cluster_size
    part = cluster // 32 if driver.kind.extended else SECTOR
    grain = (1, SECTOR, part, cluster)[unit]
    longest = min((cluster, 6 * cluster, size // 2 + cluster)[scale], size)
    offset = align_down(place * size >> 16, grain)
    length = max(align_up((extent * longest >> 16) + 1, grain), 1)
    return offset, min(length, size - offset)
