"""The pure parts of the benchmark harness. What is fast is for the harness, never for a test."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.images import choose_files, make_fragmented
from bench.library import RECIPES
from bench.measure import Pairs, Run, pair_ratio
from bench.report import BEGIN, END, missed, render, seconds, splice
from bench.rows import ROWS, Row, fill, needed_later, select
from qcowkit.extents.table import Flag
from qcowkit.image.registry import open_chain


def run_of(wall: float, *, memory: int = 0, output: int | None = None) -> Run:
    return Run(wall=wall, user=wall / 2, system=wall / 4, memory=memory, output=output)


def result(**changes: Any) -> dict[str, Any]:
    """A row as it is kept: twice as fast as qemu-img, which was asked for."""
    plain = {
        "name": "raw-qcow2",
        "title": "raw to qcow2",
        "goal": 1.5,
        "size_limit": None,
        "memory_limit": None,
        "peer_command": ["qemu-img", "convert"],
        "command": ["qcow", "convert"],
        "skipped": None,
        "failed": None,
        "ratio": 2.0,
        "cpu_ratio": 2.0,
        "size_ratio": None,
        "peer": [run_of(2.0, memory=30_000_000, output=1000).as_json()],
        "ours": [run_of(1.0, memory=90_000_000, output=1100).as_json()],
    }
    return {**plain, **changes}


def document(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    machine = {
        "cpus": 2,
        "model": "Some CPU",
        "memory": 8 << 30,
        "kernel": "6.1",
        "python": "3.11.2",
        "qemu": "version 7.2.0 (Debian)",
        "packages": {"numpy": "2.0", "isal": None},
    }
    return {"when": "2024-01-02", "pairs": 5, "place": "tmpfs", "machine": machine, "rows": rows}


def table_lines(*rows: dict[str, Any]) -> list[str]:
    """The body of the rendered table."""
    lines = [line for line in render(document(rows)).splitlines() if line.startswith("|")]
    return lines[2:]


def test_the_ratio_is_the_median_of_pairs_and_not_the_ratio_of_medians() -> None:
    peer = [run_of(wall) for wall in (10.0, 2.0, 30.0)]
    ours = [run_of(wall) for wall in (1.0, 2.0, 10.0)]
    assert pair_ratio(peer, ours, lambda run: run.wall) == 3.0


def test_runs_that_have_no_partner_are_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        pair_ratio([run_of(1.0), run_of(1.0)], [run_of(1.0)], lambda run: run.wall)


def test_processor_time_is_user_and_system_time() -> None:
    pairs = Pairs(peer=(run_of(4.0),), ours=(run_of(1.0),))
    assert run_of(4.0).cpu == 3.0
    assert (pairs.ratio, pairs.cpu_ratio) == (4.0, 4.0)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.00561, "5.6 ms"), (0.25, "250 ms"), (1.234, "1.23 s"), (12.34, "12.3 s")],
)
def test_times_are_shown_with_their_unit(value: float, text: str) -> None:
    assert seconds(value) == text


def test_a_line_shows_medians_ratio_goal_and_verdict() -> None:
    assert table_lines(result()) == ["| raw to qcow2 | 2.00 s | 1.00 s | 2.00 | 1.5 | yes |"]


def test_a_goal_that_is_missed_is_said() -> None:
    row = result(goal=2.5)
    assert table_lines(row) == ["| raw to qcow2 | 2.00 s | 1.00 s | 2.00 | 2.5 | **no** |"]
    assert missed([row]) == ["raw-qcow2: ratio 2.00, goal 2.5"]


def test_a_row_for_information_has_no_verdict() -> None:
    row = result(goal=None)
    assert table_lines(row) == ["| raw to qcow2 | 2.00 s | 1.00 s | 2.00 |  |  |"]
    assert missed([row]) == []


def test_a_skipped_row_says_why_and_does_not_count_as_missed() -> None:
    row = result(skipped="mounting needs root", ratio=None, peer=[], ours=[])
    assert table_lines(row) == [
        "| raw to qcow2 |  |  |  | 1.5 | not measured: mounting needs root |"
    ]
    assert missed([row]) == []


def test_a_failed_row_counts_as_missed() -> None:
    row = result(failed="qcow convert: exit code 1", ratio=None, peer=[], ours=[])
    assert table_lines(row) == ["| raw to qcow2 |  |  |  | 1.5 | **no**: the run failed |"]
    assert missed([row]) == ["raw-qcow2: qcow convert: exit code 1"]


def test_the_size_of_the_output_has_a_line_and_a_limit_of_its_own() -> None:
    row = result(size_ratio=1.1, size_limit=1.05)
    line = "| size of the output: raw to qcow2 | 0 MB | 0 MB | 1.10 | at most 1.05 | **no** |"
    assert table_lines(row)[1] == line
    assert missed([row]) == ["raw-qcow2: output 1.100 of the peer's, goal at most 1.05"]


def test_peak_memory_is_the_worst_of_all_rows_with_its_limit() -> None:
    worse = [run_of(1.0, memory=160_000_000).as_json()]
    rows = [
        result(memory_limit=150_000_000),
        result(memory_limit=150_000_000, title="VHD to raw", name="vpc-raw", ours=worse),
    ]
    assert table_lines(*rows)[2] == (
        "| peak memory of 2 converts, the highest: VHD to raw "
        "| 30 MB | 160 MB |  | at most 150 MB | **no** |"
    )
    assert missed(rows) == ["vpc-raw: peak memory 160 MB, goal at most 150 MB"]


def test_another_peer_than_qemu_img_is_named() -> None:
    row = result(peer_command=["python", "-c", "pass"])
    assert "| 2.00 s (Python alone) |" in table_lines(row)[0]


def test_the_machine_is_named_above_the_table() -> None:
    first = render(document([result()])).splitlines()[0]
    assert first == (
        "2024-01-02: 2 cores of Some CPU, 8 GiB, Linux 6.1, Python 3.11.2, qemu-img 7.2.0; "
        "numpy 2.0."
    )


def test_only_what_lies_between_the_markers_is_replaced() -> None:
    readme = f"before\n{BEGIN}\nold\n{END}\nbehind\n"
    assert splice(readme, "new\n") == f"before\n{BEGIN}\nnew\n{END}\nbehind\n"


@pytest.mark.parametrize("readme", ["", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}{BEGIN}{END}"])
def test_a_readme_without_markers_is_left_alone(readme: str) -> None:
    with pytest.raises(ValueError, match="README needs"):
        splice(readme, "new")


def test_readme_has_the_markers() -> None:
    text = Path(__file__).parent.parent.joinpath("README.md").read_text(encoding="utf-8")
    assert splice(text, "new").count("new") >= 1


def test_names_of_rows_are_unique() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_every_image_of_a_row_has_a_recipe() -> None:
    assert {image for row in ROWS for image in row.images} <= RECIPES.keys()


def test_rows_are_chosen_by_pattern_in_their_own_order() -> None:
    chosen = [row.name for row in select(ROWS, ["zlib-raw", "to-*"])]
    assert chosen == ["to-zlib", "to-zstd", "zlib-raw"]


def test_without_patterns_all_rows_are_chosen() -> None:
    assert select(ROWS, []) == list(ROWS)


def test_a_pattern_that_matches_nothing_is_named() -> None:
    with pytest.raises(ValueError, match="no row is called 'gone'"):
        select(ROWS, ["gone"])


def row_of(name: str, *words: str) -> Row:
    return Row(name=name, title=name, peer=("qemu-img", *words), ours=("{qcow}", *words))


def test_images_are_kept_until_their_last_row_and_the_raw_disk_for_its_family() -> None:
    rows = [row_of("a", "{big_raw}", "{out}"), row_of("b", "{big_qcow2}"), row_of("c", "{vast}")]
    assert needed_later(rows) == [{"big_raw", "big_qcow2", "disk_raw", "vast"}, {"vast"}, set()]


def test_words_of_a_command_are_filled_in() -> None:
    assert fill(("convert", "{disk_raw}"), {"disk_raw": Path("/a b")}) == ["convert", "/a b"]


def test_files_are_chosen_in_order_until_the_size_is_reached(tmp_path: Path) -> None:
    for name in ("c", "a/2", "a/1", "b"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(100))
    chosen = choose_files([tmp_path], size=250)
    assert [str(path.relative_to(tmp_path)) for path in chosen.paths] == ["b", "c", "a/1"]
    assert chosen.total == 300


def test_links_and_empty_files_are_not_chosen(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "hard").hardlink_to(tmp_path / "file")
    (tmp_path / "soft").symlink_to("file")
    (tmp_path / "empty").touch()
    assert choose_files([tmp_path], size=10).paths == (tmp_path / "file",)


@pytest.mark.parametrize(("extents", "step"), [(1, 2), (5000, 2), (5001, 3), (7, 20_000)])
def test_the_fragmented_image_has_the_extents_that_it_promises(
    tmp_path: Path, extents: int, step: int
) -> None:
    path = tmp_path / "fragmented.qcow2"
    make_fragmented(path, extents, step=step)
    with open_chain(path, format="qcow2") as disk:
        table = disk.extents()
        data = table.take((table.flags & Flag.DATA) != 0)
        assert disk.size == extents * step * 0x10000
        assert data.start.tolist() == [index * step * 0x10000 for index in range(extents)]
        assert set(data.length.tolist()) == {0x10000}
