"""Converting: whatever the shape of the target, its guest reads as the source did."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qcowkit.engine.qcow2.metadata import Qcow2Metadata
from qcowkit.errors import Cancelled, CorruptMetadata, QcowkitError, RequestError, StorageError
from qcowkit.image.chain import Chain
from qcowkit.image.gate import ReferenceGate
from qcowkit.image.qcow2 import Qcow2Image
from qcowkit.image.registry import open_chain
from qcowkit.operations.convert import ConvertOptions, convert
from qcowkit.storage.file import FileStorage
from qcowkit.testing.qcow2_builder import Verbatim, build_qcow2
from qcowkit.units import KiB, MiB
from tests.peers import peer, run_peer

SECTOR = 512


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def opened(path: str, **options: Any) -> Chain:
    return open_chain(path, gate=ReferenceGate.below_image(), **options)


def content(path: str, **options: Any) -> bytes:
    with opened(path, **options) as disk:
        return disk.read(offset=0, length=disk.size)


def copy(source: str, target: str, *, source_format: str | None = None, **options: Any) -> None:
    with opened(source, format=source_format) as disk:
        convert([disk], target, options=ConvertOptions(**options))


def write_sparse(path: str, data: bytes, *, unit: int = 4096) -> None:
    """A file whose zero units are holes."""
    with Path(path).open("wb") as file:
        for start in range(0, len(data), unit):
            part = data[start : start + unit]
            if any(part):
                file.seek(start)
                file.write(part)
        file.truncate(len(data))


@st.composite
def disks(draw: Any, *, most: int = 80) -> bytes:
    """Guest content by runs of half sectors: odd sizes, short zeros, repeats and noise."""
    runs = draw(st.lists(st.tuples(st.integers(1, most), st.integers(0, 3)), max_size=10))
    parts = []
    for index, (length, kind) in enumerate(runs):
        size = length * 256 * (8 if kind in (0, 1) else 1)
        filler = (b"", bytes([index + 1]), index.to_bytes(2, "big") + b"text ", b"")[kind]
        noise = bytes((index * 7 + at * at * 31 + (at >> 8)) & 0xFF for at in range(min(size, 999)))
        unit = noise if kind == 3 else filler or b"\0"
        parts.append((unit * (size // len(unit) + 1))[:size])
    return b"".join(parts)


@st.composite
def qcow2_options(draw: Any) -> dict[str, Any]:
    """Options that go together: see `Qcow2Spec`."""
    extended = draw(st.booleans())
    version = "1.1" if extended else draw(st.sampled_from(["0.10", "1.1", "1.1"]))
    values: dict[str, Any] = {
        "cluster_size": 1 << draw(st.integers(14 if extended else 9, 21)),
        "compat": version,
        "extended_l2": extended,
    }
    if version == "1.1":
        values["refcount_bits"] = 1 << draw(st.integers(0, 6))
        values["compression_type"] = draw(st.sampled_from(["zlib", "zstd"]))
        values["lazy_refcounts"] = draw(st.booleans())
    return values


def check_image(path: str) -> None:
    run_peer("qemu-img", "check", "-q", "-f", "qcow2", path)


many = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture
def fresh() -> Iterator[Any]:
    """A new folder for every example of hypothesis."""

    class Fresh:
        def __call__(self) -> None:
            folder = tempfile.mkdtemp(dir=home)
            os.chdir(folder)

    home = os.getcwd()
    yield Fresh()
    os.chdir(home)


def padded(data: bytes, size: int = 0) -> bytes:
    size = max(size, -(-len(data) // SECTOR) * SECTOR)
    return data.ljust(size, b"\0")


@many
@given(data=disks(), options=qcow2_options(), more=st.data())
def test_a_qcow2_target_reads_as_its_source(
    fresh: Any, data: bytes, options: dict[str, Any], more: Any
) -> None:
    fresh()
    write_sparse("s.raw", data)
    way = more.draw(st.sampled_from(["plain", "compress", "all", "allocated", "data", "raw data"]))
    flags: dict[str, Any] = {"threads": more.draw(st.sampled_from([1, 3]))}
    if way == "compress":
        flags["compress"] = True
    elif way == "all":
        flags["sparse_size"] = 0
    elif way == "allocated":
        options["preallocation"] = more.draw(st.sampled_from(["metadata", "falloc", "full"]))
    elif way in ("data", "raw data") and options["compat"] == "1.1":
        options |= {"data_file": "d.bin", "data_file_raw": way == "raw data"}
    if more.draw(st.booleans()):
        options["size"] = len(padded(data)) + more.draw(st.integers(0, 5000))
    copy("s.raw", "t.qcow2", source_format="raw", format="qcow2", create=options, **flags)
    assert content("t.qcow2") == padded(data, -(-options.get("size", 0) // SECTOR) * SECTOR)
    if "data_file" in options and options["data_file_raw"]:
        assert Path("d.bin").read_bytes() == content("t.qcow2")
    if "data_file" not in options:
        check_image("t.qcow2")


@many
@given(
    base=disks(most=60),
    changes=st.lists(st.tuples(st.integers(0, 300), disks(most=9)), max_size=4),
    middle=qcow2_options(),
    options=qcow2_options(),
    more=st.data(),
)
def test_a_copy_over_a_base_reads_as_its_source(
    fresh: Any, base: bytes, changes: list[Any], middle: Any, options: Any, more: Any
) -> None:
    """The source is an overlay of the base, or stands alone; cluster sizes differ freely."""
    fresh()
    write_sparse("base.raw", base)
    data = bytearray(base[: more.draw(st.integers(0, len(base)))])
    for at, patch in changes:
        data[at * 512 : at * 512 + len(patch)] = patch.rjust(
            len(patch) + max(0, at * 512 - len(data)), b"\0"
        )
    write_sparse("new.raw", bytes(data))
    based: dict[str, Any] = {"backing": "base.raw", "backing_format": "raw"}
    overlay(bytes(data), base, middle, alone=more.draw(st.booleans()))
    want = padded(bytes(data))
    assert content("source.qcow2") == want
    flags: dict[str, Any] = dict(based)
    way = more.draw(st.sampled_from(["plain", "compress", "larger", "allocated"]))
    if way == "compress":
        flags["compress"] = True
    if way == "larger":
        options["size"] = len(want) + 512 * more.draw(st.integers(0, 40))
    if way == "allocated" and options["extended_l2"]:
        options["preallocation"] = "metadata"
    copy("source.qcow2", "t.qcow2", format="qcow2", create=options, **flags)
    assert content("t.qcow2") == padded(want, options.get("size", 0))
    check_image("t.qcow2")


def overlay(data: bytes, base: bytes, options: dict[str, Any], *, alone: bool) -> None:
    """source.qcow2 with the content of new.raw, with or without base.raw below it."""
    if alone:
        copy("new.raw", "source.qcow2", source_format="raw", format="qcow2", create=options)
        return
    size = options["cluster_size"]
    run_peer(
        *("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw"),
        *("-o", f"cluster_size={size},extended_l2={'on' if options['extended_l2'] else 'off'}"),
        *("source.qcow2", max(len(padded(data)), 0)),
    )
    commands = []
    want, old = padded(data), padded(base).ljust(len(padded(data)), b"\0")
    for start in range(0, len(want), SECTOR):
        part = want[start : start + SECTOR]
        if part != old[start : start + SECTOR]:
            Path(f"p{start}").write_bytes(part)
            commands += [
                "-c",
                f"write -s p{start} {start} {SECTOR}"
                if any(part)
                else f"write -z {start} {SECTOR}",
            ]
    for index in range(0, len(commands), 400):
        run_peer("qemu-io", "-f", "qcow2", *commands[index : index + 400], "source.qcow2")


@many
@given(parts=st.lists(disks(most=30), min_size=2, max_size=4), options=qcow2_options())
def test_sources_of_odd_sizes_follow_one_another(
    fresh: Any, parts: list[bytes], options: dict[str, Any]
) -> None:
    fresh()
    sources = []
    for index, data in enumerate(parts):
        write_sparse(f"s{index}", data)
        if index % 2:
            copy(f"s{index}", f"q{index}", source_format="raw", format="qcow2", compress=True)
        sources.append(opened(f"q{index}") if index % 2 else opened(f"s{index}", format="raw"))
    for target in ("qcow2", "raw", "vpc"):
        create = options if target == "qcow2" else {}
        convert(sources, f"t.{target}", options=ConvertOptions(format=target, create=create))
        want = b"".join(map(padded, parts))
        assert content(f"t.{target}", format=target) == want
    for disk in sources:
        disk.close()


@many
@given(data=disks(), options=qcow2_options(), flags=st.data())
def test_a_part_of_a_compressed_source_is_that_part(
    fresh: Any, data: bytes, options: dict[str, Any], flags: Any
) -> None:
    fresh()
    write_sparse("s.raw", data)
    copy("s.raw", "s.qcow2", source_format="raw", format="qcow2", create=options, compress=True)
    size = len(padded(data))
    start = flags.draw(st.integers(0, size))
    length = flags.draw(st.integers(0, size - start))
    copy(
        *("s.qcow2", "t.qcow2"),
        format="qcow2",
        create=options,
        compress=flags.draw(st.booleans()),
        start=start,
        length=length,
    )
    assert content("t.qcow2") == padded(padded(data)[start : start + length])


@many
@given(data=disks(), old=disks(), unit=st.sampled_from([0, 512, 4096, 65536]))
def test_writing_in_place_leaves_nothing_of_the_old_content(
    fresh: Any, data: bytes, old: bytes, unit: int
) -> None:
    fresh()
    write_sparse("s.raw", data)
    copy("s.raw", "s.qcow2", source_format="raw", format="qcow2")
    tail = max(0, len(old) - len(padded(data)))
    Path("t.raw").write_bytes(b"\xaa" * (len(padded(data)) + tail))
    copy("s.qcow2", "t.raw", format="raw", in_place=True, sparse_size=unit)
    assert Path("t.raw").read_bytes() == padded(data) + b"\xaa" * tail


def test_a_raw_file_that_ends_within_a_sector_fits_onto_its_like() -> None:
    Path("s.raw").write_bytes(b"x" * 1000)
    Path("t.raw").write_bytes(b"y" * 1000)
    copy("s.raw", "t.raw", source_format="raw", format="raw", in_place=True)
    assert Path("t.raw").read_bytes() == b"x" * 1000


def test_a_target_that_is_too_small_is_not_touched() -> None:
    Path("s.raw").write_bytes(b"x" * 1024)
    Path("t.raw").write_bytes(b"y" * 512)
    with pytest.raises(RequestError, match="has 512 bytes, the source 1024: it does not fit"):
        copy("s.raw", "t.raw", source_format="raw", format="raw", in_place=True)
    assert Path("t.raw").read_bytes() == b"y" * 512


@pytest.mark.parametrize("format", ["qcow2", "raw", "vpc"])
@pytest.mark.parametrize("copy_range", [False, True])
def test_the_host_copies_long_runs_into_every_format(format: str, copy_range: bool) -> None:
    data = bytes(range(1, 256)) * (5 * MiB // 255) + bytes(3 * MiB) + b"end" * 70_000
    write_sparse("s.raw", data)
    copy("s.raw", "t", source_format="raw", format=format, copy_range=copy_range)
    assert content("t", format=format) == padded(data)


@pytest.mark.pinned("clusters of 64 KiB", "cluster_size=512")
def test_the_host_copies_no_further_than_the_source_file_reaches() -> None:
    copy_of_size(8 * 64 * KiB)
    size = Path("s.qcow2").stat().st_size
    os.truncate("s.qcow2", size - 40 * KiB)
    want = content("s.qcow2")
    copy("s.qcow2", "t.raw", format="raw", copy_range=True)
    assert Path("t.raw").read_bytes() == want


def copy_of_size(size: int) -> None:
    Path("s.raw").write_bytes((b"0123456789abcdef" * (size // 16 + 1))[:size])
    copy("s.raw", "s.qcow2", source_format="raw", format="qcow2")


@pytest.mark.parametrize(
    "case",
    [
        {"target": "top.qcow2"},
        {"target": "base.qcow2"},
        {"target": "link"},
        {"target": "hard"},
        {"target": "d.bin"},
        {"target": "top.qcow2", "in_place": True, "format": "raw"},
        {"target": "base.qcow2", "in_place": True, "format": "raw"},
        {"target": "new", "create": {"data_file": "d.bin"}},
        {"target": "new", "create": {"data_file": "base.qcow2"}},
    ],
    ids=str,
)
def test_no_file_of_the_source_is_ever_the_target(case: Mapping[str, Any]) -> None:
    Path("s.raw").write_bytes(b"x" * 64 * KiB)
    copy("s.raw", "base.qcow2", source_format="raw", format="qcow2", create={"data_file": "d.bin"})
    based = {"backing": "base.qcow2", "backing_format": "qcow2"}
    copy("base.qcow2", "top.qcow2", format="qcow2", **based)
    os.symlink("base.qcow2", "link")
    os.link("base.qcow2", "hard")
    names = sorted(os.listdir())
    before = {name: Path(name).read_bytes() for name in names}
    options = {"format": "qcow2", **case}
    with pytest.raises(RequestError, match="is one of the files that are read"):
        copy("top.qcow2", options.pop("target"), **options)
    assert sorted(os.listdir()) == names
    assert {name: Path(name).read_bytes() for name in names} == before


def test_the_backing_file_is_never_the_target() -> None:
    Path("s.raw").write_bytes(b"x" * 64 * KiB)
    Path("b.raw").write_bytes(b"y" * 64 * KiB)
    based = {"backing": "b.raw", "backing_format": "raw"}
    with pytest.raises(RequestError, match=r"b\.raw: is the backing file of the new image"):
        copy("s.raw", "b.raw", source_format="raw", format="qcow2", **based)
    assert Path("b.raw").read_bytes() == b"y" * 64 * KiB


def test_the_data_file_is_never_the_image_itself() -> None:
    Path("s.raw").write_bytes(b"x" * 64 * KiB)
    with pytest.raises(RequestError, match="the data file cannot be the new image itself"):
        copy("s.raw", "t", source_format="raw", format="qcow2", create={"data_file": "./t"})
    assert os.listdir() == ["s.raw"]


def test_a_data_file_in_a_directory_is_found_again() -> None:
    os.makedirs("image/data")
    Path("s.raw").write_bytes(b"x" * 64 * KiB)
    create = {"data_file": "data/d.bin"}
    copy("s.raw", "image/t.qcow2", source_format="raw", format="qcow2", create=create)
    assert Path("image/data/d.bin").stat().st_size == 64 * KiB
    assert content("image/t.qcow2") == b"x" * 64 * KiB


def test_a_data_file_in_a_missing_directory_leaves_nothing() -> None:
    Path("s.raw").write_bytes(b"x" * 64 * KiB)
    with pytest.raises(StorageError) as caught:
        copy("s.raw", "t", source_format="raw", format="qcow2", create={"data_file": "no/d.bin"})
    assert caught.value.errno == errno.ENOENT
    assert os.listdir() == ["s.raw"]


def test_a_backing_file_excludes_several_sources() -> None:
    Path("s.raw").write_bytes(b"x" * 1024)
    options = ConvertOptions(format="qcow2", backing="b.raw", backing_format="raw")
    with opened("s.raw", format="raw") as disk, pytest.raises(RequestError, match="several"):
        convert([disk, disk], "t", options=options)


@pytest.mark.parametrize("format", ["qcow2", "raw", "vpc"])
def test_a_disk_of_no_bytes_stays_one(format: str) -> None:
    Path("s.raw").write_bytes(b"")
    copy("s.raw", "t", source_format="raw", format=format)
    assert content("t", format=format) == b""


def test_zeros_over_a_base_are_data_in_version_2() -> None:
    write_sparse("s.raw", bytes(MiB))
    Path("b.raw").write_bytes(b"b" * MiB)
    based = {"backing": "b.raw", "backing_format": "raw", "create": {"compat": "0.10"}}
    copy("s.raw", "t.qcow2", source_format="raw", format="qcow2", **based)
    assert content("t.qcow2") == bytes(MiB)
    check_image("t.qcow2")


def test_one_bit_refcounts_give_every_compressed_cluster_its_own() -> None:
    Path("s.raw").write_bytes(bytes(range(256)) * 2048)
    create = {"refcount_bits": 1, "cluster_size": 4096}
    copy("s.raw", "t.qcow2", source_format="raw", format="qcow2", compress=True, create=create)
    assert content("t.qcow2") == bytes(range(256)) * 2048
    check_image("t.qcow2")


@pytest.mark.pinned("small clusters are rarely compressed", "cluster_size=512")
@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_compressed_clusters_travel_as_they_are(kind: str) -> None:
    data = b"".join(bytes([index & 255]) * 700 for index in range(1500))
    Path("s.raw").write_bytes(data)
    create = {"compression_type": kind}
    level = {"compression_level": 9, **create}
    copy("s.raw", "s.qcow2", source_format="raw", format="qcow2", compress=True, create=level)
    copy("s.qcow2", "t.qcow2", format="qcow2", compress=True, create=create)
    assert content("t.qcow2") == padded(data)
    pairs = list(zip(stored("t.qcow2"), stored("s.qcow2"), strict=True))
    assert len(pairs) > 10
    # The disk ends within the last cluster: that one is compressed anew.
    assert all(new.startswith(old) for new, old in pairs[:-1])


def stored(path: str) -> list[bytes]:
    with opened(path) as disk:
        (image,) = disk.images
        assert isinstance(image, Qcow2Image)
        return [image.clusters.read_stored(row) for row in disk.extents() if row.stored]


def test_the_number_of_threads_does_not_show() -> None:
    data = b"".join(bytes([index & 255]) * 3000 for index in range(3000))
    write_sparse("s.raw", data)
    images = []
    for threads in (1, 2, 5, 40):
        copy(*("s.raw", "t"), source_format="raw", format="qcow2", compress=True, threads=threads)
        images.append(Path("t").read_bytes())
    assert images[1:] == images[:-1]


def test_a_failing_target_leaves_the_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("s.raw").write_bytes(os.urandom(6 * MiB))
    Path("t").write_bytes(b"old")
    write = FileStorage.pwrite

    def full(self: FileStorage, buffers: Any, *, offset: int) -> None:
        if offset > 3 * MiB:
            raise StorageError("write", path=self.name, errno=errno.ENOSPC)
        write(self, buffers, offset=offset)

    monkeypatch.setattr(FileStorage, "pwrite", full)
    with pytest.raises(StorageError, match="ENOSPC"):
        copy("s.raw", "t", source_format="raw", format="raw")
    assert Path("t").read_bytes() == b"old"
    assert sorted(os.listdir()) == ["s.raw", "t"]


def test_no_write_is_under_way_when_a_failed_target_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or else the bytes could reach whatever opens next under the same descriptor."""
    Path("s.raw").write_bytes(b"x" * 32 * MiB)
    events: list[str] = []
    lock = threading.Lock()
    write, close = FileStorage.pwrite, FileStorage.close
    calls = iter(range(1 << 20))

    def slow(self: FileStorage, buffers: Any, *, offset: int) -> None:
        if next(calls) == 3:
            raise StorageError("write", path=self.name, errno=errno.EIO)
        with lock:
            events.append("begin")
        write(self, buffers, offset=offset)
        with lock:
            events.append("end")

    def closing(self: FileStorage) -> None:
        if self.caps.writable:
            with lock:
                events.append("close")
        close(self)

    monkeypatch.setattr(FileStorage, "pwrite", slow)
    monkeypatch.setattr(FileStorage, "close", closing)
    with pytest.raises(StorageError, match="EIO"):
        copy("s.raw", "t", source_format="raw", format="raw", threads=4)
    before = events[: events.index("close")]
    assert before.count("begin") == before.count("end")
    assert "begin" not in events[events.index("close") :]


def test_a_cancelled_copy_leaves_nothing() -> None:
    Path("s.raw").write_bytes(b"x" * 32 * MiB)
    cancel = threading.Event()

    def progress(done: int, total: int) -> None:
        cancel.set()

    options = ConvertOptions(format="qcow2")
    with opened("s.raw", format="raw") as disk, pytest.raises(Cancelled):
        convert([disk], "t", options=options, progress=progress, cancel=cancel)
    assert os.listdir() == ["s.raw"]


def broken_image() -> bytes:
    """64 KiB clusters over 8 MiB; the entry of cluster 40 has reserved bits."""
    clusters: dict[int, Any] = {index: bytes([index]) * 64 * KiB for index in range(1, 128, 3)}
    clusters[41] = Verbatim(word=0x3F00_0000_0000_0000)
    return build_qcow2(cluster_bits=16, size=8 * MiB, clusters=clusters).to_bytes()


@pytest.mark.parametrize("format", ["qcow2", "raw"])
def test_salvage_keeps_all_but_the_step_that_is_broken(format: str) -> None:
    Path("s.qcow2").write_bytes(broken_image())
    with opened("s.qcow2") as disk:
        options = ConvertOptions(format=format, salvage=True)
        done = convert([disk], "t", options=options)
    got = content("t", format=format)
    want = b"".join(bytes([i]) * 64 * KiB if i % 3 == 1 else bytes(64 * KiB) for i in range(128))
    assert got[: 2 * MiB] == want[: 2 * MiB]
    assert got[2 * MiB : 4 * MiB] == bytes(2 * MiB)
    assert got[4 * MiB :] == want[4 * MiB :]
    assert [(start, length) for start, length, _ in done.salvaged] == [(2 * MiB, 2 * MiB)]
    assert "reserved bits" in done.salvaged[0][2]


def test_without_salvage_a_broken_source_leaves_nothing() -> None:
    Path("s.qcow2").write_bytes(broken_image())
    with pytest.raises(CorruptMetadata, match="entry 41: reserved bits"):
        copy("s.qcow2", "t", format="qcow2")
    assert os.listdir() == ["s.qcow2"]


def test_salvage_gives_up_a_spot_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that can be read only the second time must not overflow what was counted first."""
    copy_of_size(8 * MiB)
    failures = iter([True, True, True, True, True])
    extents = Qcow2Image.extents

    def flaky(self: Qcow2Image, **range_: Any) -> Any:
        if range_["start"] < 4 * MiB and next(failures, False):
            raise StorageError("read", path="s", errno=errno.EIO)
        return extents(self, **range_)

    with opened("s.qcow2") as disk, monkeypatch.context() as patched:
        patched.setattr(Qcow2Image, "extents", flaky)
        done = convert([disk], "t", options=ConvertOptions(format="qcow2", salvage=True))
    want = bytearray(content("s.qcow2"))
    assert [spot[:2] for spot in done.salvaged] == [(0, 2 * MiB), (2 * MiB, 2 * MiB)]
    want[: 4 * MiB] = bytes(4 * MiB)
    assert content("t") == want


def test_a_size_below_the_source_is_refused() -> None:
    Path("s.raw").write_bytes(b"x" * 4096)
    with pytest.raises(RequestError, match="size 512 of the target is less than the source's 4096"):
        copy("s.raw", "t", source_format="raw", format="raw", create={"size": 512})


@pytest.mark.pinned("snapshots", "refcount_bits=1", "data_file")
def test_a_snapshot_is_a_source_of_its_own() -> None:
    peer("qemu-img")
    copy_of_size(256 * KiB)
    run_peer("qemu-img", "snapshot", "-c", "before", "s.qcow2")
    run_peer("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 64k", "s.qcow2")
    with opened("s.qcow2", snapshot="before") as disk:
        assert isinstance(disk.images[0].metadata, Qcow2Metadata)
        convert([disk], "t.raw", options=ConvertOptions(format="raw"))
    assert Path("t.raw").read_bytes() == Path("s.raw").read_bytes()


@pytest.mark.parametrize("size", [2**63 - 1, 2**62, 2**61 + 1])
@pytest.mark.parametrize("format", ["qcow2", "raw", "vpc"])
def test_a_size_beyond_the_format_leaves_nothing(format: str, size: int) -> None:
    Path("s.raw").write_bytes(b"x" * 4096)
    create = {"size": size}
    with pytest.raises(QcowkitError):
        copy("s.raw", "t", source_format="raw", format=format, create=create)
    assert os.listdir() == ["s.raw"]
