"""The one door to the metadata of every format."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowkit.budget import TRUSTED
from qcowkit.codecs.qcow2.extensions import Extension
from qcowkit.codecs.qcow2.identity import IDENTITY_TYPE, Identity
from qcowkit.errors import BudgetExceeded, CorruptMetadata, UnknownFormat
from qcowkit.image.metadata import RawMetadata, canonical_format, load_guid, load_metadata
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.qcow2_builder import build_qcow2
from qcowkit.testing.vhd_builder import VhdBuilder


def test_a_raw_disk_has_whole_sectors() -> None:
    metadata = load_metadata(MemoryStorage(bytes(1000)), "raw", budget=TRUSTED)
    assert metadata == RawMetadata(virtual_size=1024)
    assert (metadata.format, metadata.references) == ("raw", ())


def test_whatever_is_declared_raw_is_raw() -> None:
    image = build_qcow2(backing_name="/etc/passwd").to_bytes()
    metadata = load_metadata(MemoryStorage(image), "raw", budget=TRUSTED)
    assert metadata == RawMetadata(virtual_size=len(image))


def test_a_qcow2_is_loaded_as_one() -> None:
    storage = MemoryStorage(build_qcow2().to_bytes())
    assert load_metadata(storage, "qcow2", budget=TRUSTED).format == "qcow2"


@pytest.mark.parametrize(("format", "error"), [("qcow2", CorruptMetadata), ("vpc", UnknownFormat)])
def test_zeros_are_no_image(format: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        load_metadata(MemoryStorage(bytes(4096)), format, budget=TRUSTED)


def test_a_raw_disk_is_measured_against_the_budget() -> None:
    budget = replace(TRUSTED, virtual_size=512)
    with pytest.raises(BudgetExceeded, match="virtual size: 1024 is above the limit of 512"):
        load_metadata(MemoryStorage(bytes(1000)), "raw", budget=budget)


@pytest.mark.parametrize(("name", "format"), [("vhd", "vpc"), ("vpc", "vpc"), ("raw", "raw")])
def test_formats_have_the_names_people_use(name: str, format: str) -> None:
    assert canonical_format(name) == format


def test_an_unknown_format_is_refused_by_name() -> None:
    with pytest.raises(UnknownFormat) as caught:
        canonical_format("vmdk")
    assert str(caught.value) == "format 'vmdk' is not known, expected qcow2, vpc (vhd), luks or raw"


GUID = UUID("6ba7b810-9dad-11d1-80b4-00c04fd430c8")


def identified() -> bytes:
    own = Extension(type=IDENTITY_TYPE, data=Identity.of(GUID).encode())
    return build_qcow2(cluster_bits=9, unknown=(own,)).to_bytes()


def vhd() -> bytes:
    built = VhdBuilder(size=8192)
    built.footer["unique_id"] = GUID.bytes
    return built.build()


@pytest.mark.pinned("builds the headers that it is about")
@pytest.mark.parametrize(
    ("content", "guid"),
    [
        (identified(), GUID),
        (build_qcow2().to_bytes(), None),
        (vhd(), GUID),
        (bytes(4096), None),
        (b"", None),
        (b"KDMV" + bytes(4096), None),
        (identified() + vhd(), None),
    ],
    ids=["qcow2", "qcow2 without", "VHD", "raw", "empty", "foreign", "two formats at once"],
)
def test_a_file_says_which_disk_it_is_by_its_content(content: bytes, guid: UUID | None) -> None:
    assert load_guid(MemoryStorage(content)) == guid


@pytest.mark.pinned("builds the headers that it is about")
@given(
    content=st.sampled_from([identified(), vhd()]),
    patches=st.lists(st.tuples(st.integers(0, 1023), st.binary(min_size=1, max_size=8))),
    size=st.none() | st.integers(0, 1024),
)
def test_no_file_makes_the_question_for_its_guid_fail(
    content: bytes, patches: list[tuple[int, bytes]], size: int | None
) -> None:
    raw = bytearray(content)
    for offset, patch in patches:
        raw[offset : offset + len(patch)] = patch
    found = load_guid(MemoryStorage(bytes(raw[:size])))
    assert found is None or found.bytes in raw


@pytest.mark.parametrize("module", ["metadata", "probe"])
def test_no_numpy_is_loaded(module: str) -> None:
    code = f"import qcowkit.image.{module}, sys; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
