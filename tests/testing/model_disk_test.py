"""The model disk: bytes, zeros, and what a discard leaves open."""

from __future__ import annotations

import pytest

from qcowkit.errors import RequestError
from qcowkit.testing.model_disk import ModelDisk


def test_a_new_disk_is_zeros() -> None:
    assert ModelDisk(4).read(offset=0, length=4) == bytes(4)


def test_a_new_disk_shows_what_lies_below_and_zeros_beyond_it() -> None:
    assert ModelDisk(6, b"base").read(offset=0, length=6) == b"base\0\0"
    assert ModelDisk(2, b"base").read(offset=0, length=2) == b"ba"


def test_writes_and_zeros_are_read_back() -> None:
    disk = ModelDisk(6, b"base..")
    disk.write(b"XY", offset=1)
    disk.write_zeroes(offset=3, length=2)
    assert disk.read(offset=0, length=6) == b"bXY\0\0."


def test_what_a_resize_adds_is_zeros_even_where_it_had_been_cut() -> None:
    disk = ModelDisk(4, b"base")
    disk.resize(2)
    disk.resize(4)
    assert disk.read(offset=0, length=4) == b"ba\0\0"


@pytest.mark.parametrize("content", [b"base", b"b\0\0e", b"b\0se", b"ba\0e"])
def test_discarded_bytes_may_be_zeros_or_as_before(content: bytes) -> None:
    disk = ModelDisk(4, b"base")
    disk.discard(offset=1, length=2)
    assert disk.find_difference(content) is None


def test_discarded_bytes_may_be_nothing_else() -> None:
    disk = ModelDisk(4, b"base")
    disk.discard(offset=1, length=2)
    assert disk.find_difference(b"bXse") == 1
    assert disk.find_difference(b"\0ase") == 0
    assert disk.find_difference(b"sX", offset=2) == 3


def test_what_was_seen_after_a_discard_stays() -> None:
    disk = ModelDisk(4, b"base")
    disk.discard(offset=0, length=4)
    assert disk.settle(b"b\0\0e") is None
    assert disk.find_difference(b"b\0\0e") is None
    assert disk.find_difference(b"base") == 1
    assert disk.settle(b"base") == 1


def test_a_write_ends_what_a_discard_left_open() -> None:
    disk = ModelDisk(4, b"base")
    disk.discard(offset=0, length=4)
    disk.write(b"new!", offset=0)
    assert disk.find_difference(bytes(4)) == 0


@pytest.mark.parametrize("offset, length", [(-1, 1), (4, 1), (0, 5), (2, -1)])
def test_a_range_outside_of_the_disk_is_refused(offset: int, length: int) -> None:
    with pytest.raises(RequestError, match="is outside the disk of 0x4 bytes"):
        ModelDisk(4).read(offset=offset, length=length)


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(RequestError, match="size -1 is negative"):
        ModelDisk(4).resize(-1)
