"""Any first cluster changed into any other: whatever sectors of a step a power cut keeps, readers
find the old one or the new one."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qcowkit.codecs.qcow2.extensions import (
    Extension,
    Extensions,
    decode_extensions,
    encode_first_cluster,
)
from qcowkit.codecs.qcow2.header import Header
from qcowkit.engine.qcow2.first_cluster import SKIP_TYPE, Part, Step, plan_first_cluster
from qcowkit.errors import RequestError
from qcowkit.units import SECTOR

pytestmark = pytest.mark.pinned("encodes the first clusters that it is about")

Reading = tuple[Header, Extensions, bytes]
_UNKNOWN = st.builds(
    Extension,
    type=st.integers(0x1000_0000, 0x1000_0003),
    data=st.integers(0, 900).map(lambda length: b"d" * length),
)
_NAMES = st.one_of(st.none(), st.integers(1, 1023))


def reading(raw: bytes) -> Reading:
    """What readers learn, but for where it lies."""
    header = Header.decode(raw)
    begin, size = header.backing_file_offset, header.backing_file_size
    found = decode_extensions(raw, start=header.header_length, stop=begin or header.cluster_size)
    unknown = tuple(one for one in found.unknown if one.type != SKIP_TYPE)
    place = replace(header, backing_file_offset=0)
    return place, replace(found, unknown=unknown), raw[begin : begin + size]


def build(header: Header, name: int | None, unknown: list[Extension], letter: str) -> bytes | None:
    """A first cluster; None where it has no room."""
    extensions = Extensions(backing_format="raw" if name else None, unknown=tuple(unknown))
    try:
        return encode_first_cluster(header, extensions, letter * name if name else None)
    except RequestError:
        return None


def torn(content: bytes, step: Step, noise: random.Random) -> bytes:
    """The content after some of the sectors of a step."""
    after = bytearray(content)
    after[step.offset : step.offset + len(step.data)] = step.data
    left = bytearray(content)
    for at in range(0, len(content), SECTOR):
        if noise.random() < 0.5:
            left[at : at + SECTOR] = after[at : at + SECTOR]
    return bytes(left)


@settings(max_examples=150)
@given(
    bits=st.integers(9, 16),
    version=st.sampled_from((2, 3)),
    names=st.tuples(_NAMES, _NAMES),
    unknown=st.tuples(st.lists(_UNKNOWN, max_size=4), st.lists(_UNKNOWN, max_size=4)),
    seed=st.integers(0, 1 << 20),
)
def test_readers_find_the_old_one_or_the_new_one(
    bits: int,
    version: int,
    names: tuple[int | None, int | None],
    unknown: tuple[list[Extension], list[Extension]],
    seed: int,
) -> None:
    fields = {"header_length": 72, "unknown": b""} if version == 2 else {}
    header = Header(version=version, cluster_bits=bits, size=1 << 20, **fields)
    old = build(header, names[0], unknown[0], "o")
    new = build(replace(header, size=1 << 21), names[1], unknown[1], "n")
    if old is None or new is None:
        return
    try:
        steps = plan_first_cluster(old, new)
    except RequestError:
        assert len(new) < 1 << 14
        return
    noise, content = random.Random(seed), old
    before, after = reading(old), reading(new)
    for step in steps:
        for _ in range(4):
            assert reading(torn(content, step, noise)) in (before, after)
        content = content[: step.offset] + step.data + content[step.offset + len(step.data) :]
        expected = before if step.part in (Part.COPY, Part.REST) else after
        assert reading(content) == expected or reading(content) == after
    assert content == new
    assert plan_first_cluster(new, new) == ()
