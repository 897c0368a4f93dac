"""The table of results, from the JSON of one run, and its place in README. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

BEGIN = "<!-- bench:begin -->"
END = "<!-- bench:end -->"
MB = 1_000_000

Result = Mapping[str, Any]
Line = tuple[str, str, str, str, str, str]
_HEAD: Line = ("", "qemu-img", "qcow", "ratio", "goal", "reached")


def splice(readme: str, text: str) -> str:
    """README with `text` between the markers. Raises ValueError where they are not there once."""
    if (
        readme.count(BEGIN) != 1
        or readme.count(END) != 1
        or readme.index(BEGIN) > readme.index(END)
    ):
        raise ValueError(f"README needs {BEGIN} and, behind it, {END}, once each")
    before, rest = readme.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n{text.strip()}\n{END}{after}"


def render(document: Mapping[str, Any]) -> str:
    """What goes between the markers: the machine, the table, how to read it."""
    rows = document["rows"]
    lines = [_machine_line(document), "", *table(_lines(rows)), "", _legend(document)]
    return "\n".join(lines) + "\n"


def table(lines: Iterable[Line]) -> list[str]:
    """A Markdown table: the first and the last column to the left, numbers to the right."""
    body = ["| " + " | ".join(line) + " |" for line in (_HEAD, *lines)]
    return [body[0], "|---|---:|---:|---:|---:|---|", *body[1:]]


def _lines(rows: Sequence[Result]) -> Iterator[Line]:
    for row in rows:
        yield _time_line(row)
    measured = [row for row in rows if _is_measured(row)]
    for row in measured:
        if row["size_ratio"] is not None:
            yield _size_line(row)
    by_limit: dict[tuple[int, str], list[Result]] = {}
    for row in measured:
        if row["memory_limit"] is not None:
            verb = row["command"][1]
            by_limit.setdefault((row["memory_limit"], verb), []).append(row)
    for (limit, _), group in by_limit.items():
        yield _memory_line(group, limit)


def missed(rows: Iterable[Result]) -> list[str]:
    """One line for each goal that was not reached, and for each row that failed. What was skipped
    is in the table only."""
    found = []
    for row in rows:
        if row["failed"]:
            found.append(f"{row['name']}: {row['failed']}")
        if not _is_measured(row):
            continue
        if row["goal"] is not None and row["ratio"] < row["goal"]:
            found.append(f"{row['name']}: ratio {row['ratio']:.2f}, goal {row['goal']}")
        if row["size_limit"] is not None and row["size_ratio"] > row["size_limit"]:
            found.append(
                f"{row['name']}: output {row['size_ratio']:.3f} of the peer's, "
                f"goal at most {row['size_limit']}"
            )
        if row["memory_limit"] is not None and peak(row, "ours") > row["memory_limit"]:
            found.append(
                f"{row['name']}: peak memory {_megabytes(peak(row, 'ours'))}, "
                f"goal at most {_megabytes(row['memory_limit'])}"
            )
    return found


def peak(row: Result, side: str) -> int:
    """The highest peak memory of a side's runs, bytes."""
    return max(int(run["memory"]) for run in row[side])


def _is_measured(row: Result) -> bool:
    return not row["failed"] and not row["skipped"]


def _time_line(row: Result) -> Line:
    goal = "" if row["goal"] is None else f"{row['goal']:g}"
    if row["skipped"]:
        return row["title"], "", "", "", goal, f"not measured: {_cell(row['skipped'])}"
    if row["failed"]:
        return row["title"], "", "", "", goal, "**no**: the run failed"
    peer = seconds(_median(row["peer"]))
    if row["peer_command"][0] != "qemu-img":
        peer += " (Python alone)"
    reached = "" if row["goal"] is None else _yes(row["ratio"] >= row["goal"])
    ours = seconds(_median(row["ours"]))
    return row["title"], peer, ours, f"{row['ratio']:.2f}", goal, reached


def _size_line(row: Result) -> Line:
    limit, ratio = row["size_limit"], row["size_ratio"]
    return (
        f"size of the output: {row['title']}",
        _megabytes(_median(row["peer"], "output")),
        _megabytes(_median(row["ours"], "output")),
        f"{ratio:.2f}",
        "" if limit is None else f"at most {limit:g}",
        "" if limit is None else _yes(ratio <= limit),
    )


def _memory_line(rows: Sequence[Result], limit: int) -> Line:
    """The worst of several rows with one limit."""
    worst = max(rows, key=lambda row: peak(row, "ours"))
    peer = max(peak(row, "peer") for row in rows)
    title = f"peak memory: {worst['title']}"
    if len(rows) > 1:
        title = f"peak memory of {len(rows)} converts, the highest: {worst['title']}"
    ours = peak(worst, "ours")
    return (
        title,
        _megabytes(peer),
        _megabytes(ours),
        "",
        f"at most {_megabytes(limit)}",
        _yes(ours <= limit),
    )


def _machine_line(document: Mapping[str, Any]) -> str:
    machine = document["machine"]
    packages = ", ".join(
        f"{name} {version}" for name, version in machine["packages"].items() if version
    )
    cores = "core" if machine["cpus"] == 1 else "cores"
    return (
        f"{document['when']}: {machine['cpus']} {cores} of {machine['model']}, "
        f"{machine['memory'] / (1 << 30):.0f} GiB, Linux {machine['kernel']}, "
        f"Python {machine['python']}, qemu-img {_short(machine['qemu'])}; {packages}."
    )


def _legend(document: Mapping[str, Any]) -> str:
    return (
        f"Medians of {document['pairs']} pairs on {document['place']}; ratio: qemu-img over qcow, "
        "the median over pairs, so above 1 qcow is the faster. Outputs were verified. "
        "Command: `make bench`; raw times are in `bench/results`."
    )


def _short(version: str) -> str:
    return version.removeprefix("version ").partition(" ")[0]


def _median(runs: Sequence[Mapping[str, Any]], key: str = "wall") -> float:
    return float(statistics.median(run[key] for run in runs))


def seconds(value: float) -> str:
    """Three significant digits: `1.23 s`, `45.6 ms`."""
    # The precision keeps trailing zeros, so that columns look alike.
    if value >= 1:
        return f"{value:.{2 if value < 10 else 1}f} s"
    return f"{value * 1000:.{0 if value >= 0.1 else 1}f} ms"


def _megabytes(value: float) -> str:
    return f"{value / MB:.0f} MB"


def _cell(text: str) -> str:
    """Text that cannot end a table cell."""
    return " ".join(text.replace("|", "/").split())


def _yes(reached: bool) -> str:
    return "yes" if reached else "**no**"
