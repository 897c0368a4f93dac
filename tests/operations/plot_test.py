"""The drawn cluster map: shares against a plain count, and files that others can read."""

from __future__ import annotations

import re
import struct
import zlib
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowkit.errors import RequestError
from qcowkit.extents.algebra import overlay
from qcowkit.extents.table import Extent, ExtentTable, Flag, empty, make_table
from qcowkit.operations.plot import plot_png, plot_svg, plot_terminal
from qcowkit.operations.plotting.cells import State, measure_cells
from qcowkit.operations.plotting.font import text_dots
from qcowkit.operations.plotting.png import encode_png
from qcowkit.operations.plotting.scene import percent
from qcowkit.testing.disks import TableDisk
from qcowkit.testing.strategies import extent_tables

DATA = int(Flag.DATA | Flag.PRESENT)
ZERO = int(Flag.ZERO | Flag.PRESENT)
PACKED = int(Flag.DATA | Flag.PRESENT | Flag.COMPRESSED)
MIB = 1 << 20

SVG = "{http://www.w3.org/2000/svg}"


def mixed() -> TableDisk:
    """One MiB of each state, in the order of State."""
    return TableDisk(
        make_table(
            np.arange(5) * MIB,
            MIB,
            [DATA, PACKED, DATA, ZERO, 0],
            layer=[0, 0, 1, 0, 0],
            host=[0, 1, 2, -1, -1],
        )
    )


def state_of(row: Extent) -> State:
    if row.flags & Flag.DATA:
        here = State.COMPRESSED if row.flags & Flag.COMPRESSED else State.DATA
        return State.BACKING if row.layer else here
    return State.ZERO if row.flags & Flag.PRESENT else State.UNALLOCATED


@given(
    top=extent_tables(unit=512),
    base=extent_tables(layer=1, unit=512),
    window=st.integers(1, 5),
    cells=st.integers(1, 40),
)
def test_the_shares_of_each_cell_agree_with_a_count_row_by_row(
    top: ExtentTable, base: ExtentTable, window: int, cells: int
) -> None:
    disk = TableDisk(overlay(top, base), window=window)
    found = measure_cells(disk, cells=cells)
    expected = np.zeros(found.shares.shape, dtype=np.int64)
    for cell in range(len(found)):
        begin, end = found.offset(cell), found.offset(cell + 1)
        for row in disk.table:
            common = min(end, row.start + row.length) - max(begin, row.start)
            expected[cell, state_of(row)] += max(0, common)
    assert found.shares.tolist() == expected.tolist()


def test_a_disk_of_the_largest_size_is_shared_out_exactly() -> None:
    size = (1 << 63) - 1
    disk = TableDisk(make_table([0], [size], DATA, host=0))
    cells = measure_cells(disk, cells=1000)
    assert cells.totals == [size, 0, 0, 0, 0]


def test_one_cluster_of_data_in_a_sea_of_zeros_is_seen() -> None:
    table = make_table([0, 512], [512, 1 << 30], [DATA, ZERO], host=[0, -1])
    states, levels = measure_cells(TableDisk(table), cells=1).looks()
    assert (states.tolist(), levels.tolist()) == ([State.DATA], [0])


def test_levels_say_how_full_a_cell_is() -> None:
    table = make_table([0, 1024], [1024, 3072], [DATA, 0])
    states, levels = measure_cells(TableDisk(table), cells=2).looks()
    assert states.tolist() == [State.DATA, State.UNALLOCATED]
    assert levels.tolist() == [1, 3]


@pytest.mark.parametrize("cells", [0, (1 << 20) + 1])
def test_a_number_of_cells_out_of_range_is_refused(cells: int) -> None:
    with pytest.raises(RequestError, match=f"{cells} cells cannot be drawn"):
        measure_cells(mixed(), cells=cells)


def test_the_svg_is_well_formed_and_has_a_box_for_each_cell() -> None:
    root = ElementTree.fromstring(plot_svg(mixed(), title="disk", columns=10, rows=4))
    outlines = "".join(path.get("d", "") for path in root.iter(f"{SVG}path"))
    cells, bar, legend = 40, 5, 5
    assert outlines.count("M") == cells + bar + legend


def test_the_svg_carries_title_and_summary_for_who_cannot_see_it() -> None:
    root = ElementTree.fromstring(plot_svg(mixed(), title="a <b> & \x01\udc80"))
    assert root.findtext(f"{SVG}title") == "a <b> & \ufffd\ufffd"
    assert root.findtext(f"{SVG}desc") == (
        "5 MiB: data 1 MiB, compressed 1 MiB, from backing 1 MiB, zero 1 MiB, unallocated 1 MiB"
    )


def test_the_svg_has_colours_for_dark_ground() -> None:
    assert "@media (prefers-color-scheme:dark)" in plot_svg(mixed(), title="disk")


def test_a_long_title_is_shortened() -> None:
    root = ElementTree.fromstring(plot_svg(mixed(), title="x" * 500, columns=8, rows=8))
    [title] = [text.text for text in root.iter(f"{SVG}text") if text.get("class") == "title"]
    assert title is not None
    assert title.endswith("x...")
    assert len(title) < 100


def read_png(raw: bytes) -> tuple[np.ndarray, bytes]:
    """Colour indices and palette of a PNG, with every chunk's checksum verified."""
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    chunks: dict[bytes, bytes] = {}
    at = 8
    while at < len(raw):
        length = struct.unpack_from(">I", raw, at)[0]
        kind, data = raw[at + 4 : at + 8], raw[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", raw, at + 8 + length)[0] == zlib.crc32(kind + data)
        chunks[kind] = data
        at += 12 + length
    width, height, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert rest == [8, 3, 0, 0, 0]
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), dtype=np.uint8)
    lines = lines.reshape(height, width + 1)
    assert not lines[:, 0].any()
    return lines[:, 1:], chunks[b"PLTE"]


def test_a_png_reads_back_as_what_was_drawn() -> None:
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    found, palette = read_png(encode_png(pixels, bytes(36)))
    assert found.tolist() == pixels.tolist()
    assert palette == bytes(36)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_png_uses_only_colours_of_its_palette(theme: str) -> None:
    raw = plot_png(mixed(), title="disk", columns=10, rows=4, theme=theme)  # type: ignore[arg-type]
    pixels, palette = read_png(raw)
    assert int(pixels.max()) < len(palette) // 3


def test_light_and_dark_png_differ_in_colours_alone() -> None:
    light = read_png(plot_png(mixed(), title="disk"))
    dark = read_png(plot_png(mixed(), title="disk", theme="dark"))
    assert light[0].tolist() == dark[0].tolist()
    assert light[1] != dark[1]


def test_every_printable_character_has_dots_of_its_own() -> None:
    shapes = {text_dots(chr(code)).tobytes() for code in range(32, 127)}
    assert len(shapes) == 95
    assert text_dots("\u00e9").tobytes() == text_dots("\u4e16").tobytes()
    assert text_dots("").shape == (9, 0)


def test_the_terminal_map_without_colours_has_a_character_for_each_state() -> None:
    text = plot_terminal(mixed(), columns=30, rows=1, color=False)
    assert text.splitlines()[0] == "     0 B  ████▓▓▓▓▒▒▒▒░░░░····"
    assert "\x1b" not in text


def test_the_terminal_map_in_colours_shows_the_same_cells() -> None:
    text = plot_terminal(mixed(), columns=30, rows=1, color=True)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert plain.splitlines()[0] == "     0 B  ████████████████····"
    assert text.splitlines()[0].endswith("\x1b[0m")


def test_the_terminal_map_keeps_to_its_width() -> None:
    lines = plot_terminal(mixed(), columns=50, rows=3, color=False).splitlines()
    assert max(map(len, lines[:3])) == 50
    assert lines[3] == ""


def test_the_terminal_legend_gives_sizes_and_shares() -> None:
    lines = plot_terminal(mixed(), columns=30, rows=1, color=False).splitlines()
    assert lines[2].split() == ["██", "data", "1", "MiB", "20.0", "%"]
    assert lines[-1].strip() == "5 MiB in 20 cells of 256 KiB"


def test_an_empty_disk_can_be_drawn() -> None:
    disk = TableDisk(empty())
    assert "the disk is empty" in plot_terminal(disk, color=False)
    ElementTree.fromstring(plot_svg(disk, title="nothing"))
    read_png(plot_png(disk, title="nothing", columns=1, rows=1))


def test_a_picture_without_cells_is_refused() -> None:
    with pytest.raises(RequestError, match="a picture of 0 by 4 cells cannot be drawn"):
        plot_svg(mixed(), title="disk", columns=0, rows=4)


def test_shares_never_claim_what_they_are_not() -> None:
    shares = [percent(part, 10_000) for part in (0, 1, 1234, 9_999, 10_000)]
    assert shares == ["0 %", "<0.1 %", "12.3 %", "99.9 %", "100 %"]
