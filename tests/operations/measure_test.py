"""Measuring: the figures of qemu-img to the byte, and never less than what converting needs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qcowkit.errors import RequestError
from qcowkit.image.chain import Chain
from qcowkit.image.gate import ReferenceGate
from qcowkit.image.registry import open_chain
from qcowkit.operations.convert import ConvertOptions, convert
from qcowkit.operations.measure import Measurement, measure
from qcowkit.testing.qcow2_builder import BitmapSpec, build_qcow2
from qcowkit.units import GiB, KiB, MiB, TiB
from tests.peers import run_peer

quick = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def opened(path: str, **options: Any) -> Chain:
    return open_chain(path, gate=ReferenceGate.below_image(), **options)


def qemu(*arguments: object) -> dict[str, int]:
    found: dict[str, int] = json.loads(run_peer("qemu-img", "measure", "--output=json", *arguments))
    return found


@quick
@given(
    size=st.one_of(st.integers(0, 2 * TiB), st.integers(0, 20 * MiB)),
    bits=st.integers(12, 21),
    order=st.integers(0, 6),
    preallocation=st.sampled_from(["off", "metadata", "falloc", "full"]),
)
def test_the_figures_for_an_empty_disk_are_those_of_qemu(
    size: int, bits: int, order: int, preallocation: str
) -> None:
    text = f"cluster_size={1 << bits},refcount_bits={1 << order},preallocation={preallocation}"
    options = {
        "cluster_size": 1 << bits,
        "refcount_bits": 1 << order,
        "preallocation": preallocation,
    }
    size = min(size, 1 << 2 * bits + 14)
    want = qemu("-O", "qcow2", "-o", text, "--size", size)
    found = measure(None, size=size, format="qcow2", options=options)
    assert (found.required, found.fully_allocated) == (want["required"], want["fully-allocated"])


@quick
@given(
    runs=st.lists(st.tuples(st.integers(0, 400), st.integers(1, 60)), max_size=6),
    bits=st.integers(12, 18),
)
def test_no_conversion_needs_more_than_was_measured(runs: list[Any], bits: int) -> None:
    with Path("s.raw").open("wb") as file:
        file.truncate(4 * MiB)
        for at, count in runs:
            file.seek(at * 4096)
            file.write(b"d" * count * 4096)
    options = {"cluster_size": 1 << bits}
    for format, values in (
        ("qcow2", options),
        ("raw", {}),
        ("vpc", {}),
        ("vpc", {"subformat": "fixed"}),
    ):
        with opened("s.raw", format="raw") as disk:
            found = measure(disk, format=format, options=values)
            convert([disk], "t", options=ConvertOptions(format=format, create=values))
        size = os.stat("t").st_size
        assert size <= found.required <= found.fully_allocated
        if format != "qcow2":
            assert size == found.required


def test_bitmaps_are_measured_as_if_full() -> None:
    bitmaps = [BitmapSpec(name="one"), BitmapSpec(name="other", granularity_bits=9)]
    Path("s.qcow2").write_bytes(build_qcow2(size=64 * MiB, bitmaps=bitmaps).to_bytes())
    with opened("s.qcow2") as disk:
        found = measure(disk, format="qcow2", options={})
    want = qemu("-O", "qcow2", "-f", "qcow2", "s.qcow2")
    assert found.as_json() == want


def test_a_source_without_bitmaps_is_measured_without() -> None:
    Path("s.raw").write_bytes(bytes(MiB))
    with opened("s.raw", format="raw") as disk:
        assert measure(disk, format="qcow2", options={}).bitmaps is None


def test_a_copy_over_a_base_is_measured_in_full() -> None:
    found = measure(None, size=GiB, format="qcow2", options={"backing_file": "b"})
    assert found.required == found.fully_allocated


def test_a_disk_of_64_tib_is_measured_at_once() -> None:
    found = measure(None, size=64 * TiB, format="qcow2", options={})
    assert found.fully_allocated > 64 * TiB


def test_neither_source_nor_size_is_refused() -> None:
    with pytest.raises(RequestError, match="neither a source nor a size was given"):
        measure(None, format="qcow2", options={})


def test_the_lines_show_bytes_and_units() -> None:
    shown = Measurement(required=512, fully_allocated=64 * KiB, bitmaps=0).render()
    assert shown == [
        "required size: 512 (512 B)",
        "fully allocated size: 65536 (64 KiB)",
        "bitmaps size: 0 (0 B)",
    ]
