"""Contiguous runs: what is read back, what is not a list of runs, and which run holds a byte."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowkit.codecs.qcow2.extensions import (
    Extensions,
    decode_extensions,
    encode_first_cluster,
)
from qcowkit.codecs.qcow2.geometry import Geometry
from qcowkit.codecs.qcow2.header import FeatureKind, Header, new_header
from qcowkit.codecs.qcow2.runs import MAX_RUNS, ContiguousRuns, Run
from qcowkit.units import MiB

CLUSTER = 65536
TWO = ContiguousRuns(
    runs=(Run(0, 4 * CLUSTER, 8 * CLUSTER), Run(6 * CLUSTER, CLUSTER, 32 * CLUSTER))
)


@st.composite
def lists(draw: st.DrawFn) -> ContiguousRuns:
    position, runs = 0, []
    for gap, length, host in draw(
        st.lists(
            st.tuples(st.integers(0, 9), st.integers(1, 9), st.integers(1, 99)),
            min_size=1,
            max_size=MAX_RUNS,
        )
    ):
        position += gap * CLUSTER
        runs.append(Run(position, length * CLUSTER, host * CLUSTER))
        position += length * CLUSTER
    return ContiguousRuns(runs=tuple(runs))


@given(lists())
def test_what_is_written_is_read_back(runs: ContiguousRuns) -> None:
    assert ContiguousRuns.decode(runs.encode()) == runs


@given(lists(), st.integers(0, 64 * 18 * CLUSTER))
def test_a_byte_is_found_where_a_walk_would_find_it(runs: ContiguousRuns, offset: int) -> None:
    holding = [run for run in runs.runs if run.start <= offset < run.start + run.length]
    assert runs.find(offset) == (holding[0] if holding else None)
    later = [run.start for run in runs.runs if run.start > offset]
    assert runs.next_start(offset, -1) == (later[0] if later else -1)


def edited(raw: bytes, offset: int, form: str, value: int) -> bytes:
    changed = bytearray(raw)
    struct.pack_into(form, changed, offset, value)
    return bytes(changed)


RAW = TWO.encode()
BROKEN = {
    "empty": b"",
    "another version": edited(RAW, 0, ">B", 2),
    "reserved bytes": edited(RAW, 1, ">B", 1),
    "no runs": edited(RAW, 4, ">I", 0),
    "more runs than there are": edited(RAW, 4, ">I", 3),
    "too many runs": edited(RAW, 4, ">I", MAX_RUNS + 1),
    "a run of no bytes": edited(RAW, 16, ">Q", 0),
    "out of order": edited(RAW, 8 + 24, ">Q", CLUSTER),
    "beyond 63 bits": edited(RAW, 8 + 24 + 8, ">Q", (1 << 64) - CLUSTER),
    "host beyond 63 bits": edited(RAW, 8 + 16, ">Q", (1 << 64) - CLUSTER),
    "cut": RAW[:-1],
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_list_of_runs_is_an_unknown_extension(case: str) -> None:
    assert ContiguousRuns.decode(BROKEN[case]) is None


@pytest.mark.parametrize(
    ("disk", "file", "cluster", "fits"),
    [
        (7, 33, CLUSTER, True),
        (6, 33, CLUSTER, False),
        (7, 32, CLUSTER, False),
        (7, 33, 2 * CLUSTER, False),
    ],
)
def test_runs_fit_into_disk_and_file(disk: int, file: int, cluster: int, fits: bool) -> None:
    found = TWO.fits(cluster_size=cluster, disk_size=disk * CLUSTER, file_size=file * CLUSTER)
    assert found is fits


def test_an_image_with_runs_names_their_bit() -> None:
    header = new_header(Geometry(cluster_bits=16), size=MiB)
    raw = encode_first_cluster(header, Extensions(runs=TWO), None)
    start = Header.decode(raw).header_length
    read = decode_extensions(raw, start=start, stop=CLUSTER)
    assert read.runs == TWO
    assert read.feature_names[FeatureKind.AUTOCLEAR, 61] == "contiguous runs"
