"""The pure parts of the benchmark harness. What is fast is for the harness, never for a test."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.images import choose_files, make_fragmented
from bench.library import RECIPES
from bench.measure import CommandFailed, Pairs, Run, pair_ratio, run_once
from bench.report import BEGIN, END, missed, rate, render, seconds, splice
from bench.requests import (
    Blank,
    KiB,
    Requests,
    io,
    operation_seconds,
    paired,
    probes,
    reported_seconds,
    scattered,
)
from bench.rows import ROWS, Row, fill, needed_later, select
from bench.run import QCOW
from bench.timing import time_requests
from bench.write_rows import REQUEST_ROWS
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
    names = [row.name for row in (*ROWS, *REQUEST_ROWS)]
    assert len(set(names)) == len(names)


def test_every_image_of_a_row_has_a_recipe() -> None:
    assert {image for row in ROWS for image in row.images} <= RECIPES.keys()


def test_rows_are_chosen_by_pattern_in_their_own_order() -> None:
    chosen = [row.name for row in select(ROWS, ["zlib-raw", "to-*"])]
    assert chosen == ["to-zlib", "to-zstd", "zlib-raw", "to-luks"]


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


# Rows about single requests.


def requests_result(**changes: Any) -> dict[str, Any]:
    """A row about 1000 requests as it is kept: 4 times as fast as `qemu-img bench`."""
    plain = {
        **result(goal=3.0, ratio=4.0),
        "name": "io-allocate",
        "title": "allocating",
        "requests": 1000,
        "peer_label": "",
        "peer": [run_of(2.0).as_json()],
        "ours": [run_of(0.5).as_json()],
        "api": [run_of(0.25).as_json()],
    }
    return {**plain, **changes}


def test_requests_are_shown_by_their_rate() -> None:
    assert table_lines(requests_result()) == [
        "| allocating | 500 | 2.0 k | 4.0 k | 4.00 | 3 | yes |"
    ]


def test_a_single_request_is_shown_by_its_time() -> None:
    row = requests_result(requests=1, goal=None, api=[])
    assert table_lines(row) == ["| allocating | 2.00 s | 500 ms |  | 4.00 |  |  |"]


def test_a_peer_of_requests_that_is_not_qemu_img_is_named() -> None:
    assert "| 500 (qemu-io) |" in table_lines(requests_result(peer_label="qemu-io"))[0]


def test_requests_that_were_not_measured_leave_the_row_as_wide_as_others() -> None:
    row = requests_result(skipped="no room", peer=[], ours=[], api=[], ratio=None)
    assert table_lines(row) == ["| allocating |  |  |  |  | 3 | not measured: no room |"]


def test_requests_have_a_table_of_their_own_behind_the_commands() -> None:
    text = render(document([requests_result(), result()]))
    heads = [line for line in text.splitlines() if line.startswith("|") and "goal" in line]
    assert [head.split("|")[1].strip() for head in heads] == ["", "requests a second"]
    assert text.index("raw to qcow2") < text.index("allocating")


@pytest.mark.parametrize(
    ("value", "text"),
    [(123_456.0, "123 k"), (9_530.0, "9.5 k"), (847.2, "847"), (3.21, "3.2")],
)
def test_rates_are_shown_in_thousands(value: float, text: str) -> None:
    assert rate(value) == text


def test_the_seconds_of_bench_are_read_from_what_it_prints() -> None:
    assert reported_seconds("Sending 5 requests\nRun completed in 1.250 seconds.\n") == 1.25


def test_the_seconds_of_single_commands_are_the_sum_over_those_with_figures() -> None:
    printed = (
        "4096,1,0:00:00.25,16384.000,4.0000\n"
        "wrote 4096/4096 bytes at offset 0\n"
        "4 KiB, 1 ops; 00.00 sec (15.368 MiB/sec and 3934.0960 ops/sec)\n"
        "qemu-io> qemu-io> 65536,1,0:00:00.50,131072.000,2.0000\n"
    )
    assert operation_seconds(printed) == 0.75


@pytest.mark.parametrize("clock", [reported_seconds, operation_seconds])
def test_output_without_a_time_is_an_error(clock: Any) -> None:
    with pytest.raises(ValueError, match="found 'nothing'"):
        clock("nothing")


def test_the_time_that_a_command_reports_stands_for_that_of_its_run() -> None:
    argv = (sys.executable, "-c", "print('completed in 77.5 seconds')")
    assert run_once(argv, clock=reported_seconds).wall == 77.5


def test_a_command_that_reports_no_time_has_failed() -> None:
    with pytest.raises(CommandFailed, match="expected 'completed in"):
        run_once((sys.executable, "-c", "pass"), clock=reported_seconds)


@pytest.mark.parametrize("size", [1 << 24, 1 << 30, 1 << 40, 1 << 43])
def test_scattered_offsets_come_round_only_after_all_of_them(size: int) -> None:
    grain = 4 * KiB
    step = scattered(size, grain=grain)
    assert math.gcd(step // grain, size // grain) == 1
    # qemu-img takes no longer ones.
    assert step % grain == 0
    assert 0 < step < 1 << 31


def test_scattered_offsets_reach_every_part_of_a_disk_soon() -> None:
    size, parts = 1 << 40, 2048
    step = scattered(size, grain=64 * KiB)
    met = {index * step % size * parts // size for index in range(4 * parts)}
    assert len(met) > 0.97 * parts


def test_both_tools_and_the_library_get_the_same_requests() -> None:
    requests = Requests(count=7, step=12345, size=512, flush=3, depth=2)
    row = paired(
        "io", "io", image=Blank(size=1 << 20), requests=requests, options={"l2-cache-size": 4096}
    )
    assert row.peer[1:] == row.ours[1:]
    flags = ("-c", "7", "-s", "512", "-S", "12345", "-d", "2", "-w", "--pattern=165")
    target = ("--image-opts", "driver=qcow2,file.filename={image},l2-cache-size=4096")
    assert row.ours == ("{qcow}", "bench", *flags, "--flush-interval=3", *target)
    loop = ("--count", "7", "--size", "512", "--step", "12345", "--flush", "3", "--pattern", "165")
    assert row.api[3:] == (*loop, "--option", "l2-cache-size=4096", "{image}")


def test_what_was_written_and_what_lies_beside_it_is_looked_for() -> None:
    requests = Requests(count=3, step=128 * KiB)
    row = paired("io", "io", image=Blank(size=256 * KiB, base="raw"), requests=requests)
    assert probes(row, count=3) == (
        "read -P 165 0 4096",
        "read -P 92 4096 61440",
        "read -P 165 131072 4096",
        "read -P 92 135168 61440",
        "read -P 165 0 4096",
        "read -P 92 4096 61440",
    )


def test_nothing_is_looked_for_beside_what_was_overwritten() -> None:
    image = Blank(size=1 << 20, options=("preallocation=falloc",))
    row = paired("io", "io", image=image, requests=Requests(count=1, step=4 * KiB))
    assert set(probes(row)) == {"read -P 165 0 4096"}


def test_reads_leave_nothing_to_look_for() -> None:
    requests = Requests(count=1, step=4 * KiB, write=False)
    assert probes(paired("io", "io", image=Blank(size=1 << 20), requests=requests)) == ()


def test_a_disk_that_grows_is_made_by_two_commands() -> None:
    blank = Blank(size=1 << 20, grown=1 << 16, options=("preallocation=metadata",))
    create, resize = blank.commands()
    assert create[0] == resize[0]
    assert create[-1] == str(1 << 20)
    assert resize[-1] == str(blank.full_size) == str((1 << 20) + (1 << 16))


def test_every_row_about_requests_has_an_image_that_a_command_makes() -> None:
    for row in REQUEST_ROWS:
        assert "{image}" in row.image.commands()[0]
        assert any("{image}" in word for word in row.peer)
        assert any("{image}" in word for word in row.ours)


def small_row(**changes: Any) -> Any:
    """A row whose runs take no time to speak of."""
    image = Blank(size=1 << 20, base="raw")
    return replace(
        paired("io", "io", image=image, requests=Requests(count=4, step=64 * KiB)), **changes
    )


@pytest.mark.peer("qemu-img", "qemu-io")
def test_a_row_about_requests_is_run_on_all_sides_and_leaves_nothing(tmp_path: Path) -> None:
    pairs, api = time_requests(small_row(), folder=tmp_path, qcow=QCOW, pairs=1)
    assert (len(pairs.peer), len(pairs.ours), len(api)) == (1, 1, 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.peer("qemu-img", "qemu-io")
def test_a_row_whose_requests_were_lost_has_failed(tmp_path: Path) -> None:
    elsewhere = small_row(written=Requests(count=4, step=4 * KiB))
    with pytest.raises(CommandFailed, match="read -P 165"):
        time_requests(elsewhere, folder=tmp_path, qcow=QCOW, pairs=1)


@pytest.mark.peer("qemu-img", "qemu-io")
def test_commands_of_a_script_are_timed_one_by_one(tmp_path: Path) -> None:
    row = small_row(
        peer=io("qemu-io", (), "{image}"),
        ours=("{qcow}", *io("io", (), "{image}")),
        api=(),
        script=("write -C -P 165 0 4k", "flush", "write -C -P 165 64k 4k"),
        clock="operations",
        written=Requests(count=2, step=64 * KiB),
    )
    pairs, api = time_requests(row, folder=tmp_path, qcow=QCOW, pairs=1)
    assert pairs.peer[0].wall > 0
    assert pairs.ours[0].wall > 0
    assert api == ()


def test_warming_up_is_for_the_library_alone() -> None:
    plain = Requests(count=7, step=4 * KiB)
    warm = replace(plain, warm=3)
    assert warm.words() == plain.words()
    assert set(warm.loop()) - set(plain.loop()) == {"--warm", "3"}


def test_a_script_is_given_to_a_command_as_its_input(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("completed in 8 seconds")
    argv = (sys.executable, "-c", "print(input())")
    assert run_once(argv, script=script, clock=reported_seconds).wall == 8


def test_without_a_script_a_command_has_no_input() -> None:
    run_once((sys.executable, "-c", "import sys; sys.exit(sys.stdin.read() != '')"))


@pytest.mark.peer("qemu-img", "qemu-io")
def test_an_image_can_be_left_as_after_a_crash(tmp_path: Path) -> None:
    image = Blank(size=1 << 20, options=("lazy_refcounts=on",), crash=("write 0 4k", "flush"))
    # The lowest bit of the features that a reader must know.
    is_dirty = "import sys; sys.exit(not open(sys.argv[1], 'rb').read(80)[79] & 1)"
    row = small_row(
        image=image,
        peer=("{python}", "-c", is_dirty, "{image}"),
        ours=("qemu-img", "check", "-r", "all", "{image}"),
        api=(),
        clock="wall",
        written=None,
    )
    assert image.killed()[-2:] == ("abort", "{image}")
    pairs, _ = time_requests(row, folder=tmp_path, qcow=QCOW, pairs=1)
    assert len(pairs.ours) == 1


def test_subclusters_and_contiguous_runs_have_rows_of_their_own() -> None:
    """S002-18."""
    names = {row.name for row in ROWS} | {row.name for row in REQUEST_ROWS}
    assert {"io-extended", "io-runs"} <= names
