"""The table of results, from the JSON of one run, and its place in README. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

BEGIN = "<!-- bench:begin -->"
END = "<!-- bench:end -->"
MB = 1_000_000

Result = Mapping[str, Any]
Line = tuple[str, ...]
_HEAD: Line = ("", "qemu-img", "qcow", "ratio", "goal", "reached")
_REQUESTS_HEAD: Line = (
    "requests a second",
    "qemu-img bench",
    "qcow bench",
    "library",
    "ratio",
    "goal",
    "reached",
)


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
    """What goes between the markers: the machine, the tables, how to read them."""
    requests = [row for row in document["rows"] if _is_about_requests(row)]
    commands = [row for row in document["rows"] if not _is_about_requests(row)]
    lines = [_machine_line(document), ""]
    if commands:
        lines += [*table(_HEAD, _lines(commands)), ""]
    if requests:
        lines += [*table(_REQUESTS_HEAD, map(_request_line, requests)), ""]
    lines.append(_legend(document))
    if requests:
        lines += ["", _REQUESTS_LEGEND]
    return "\n".join(lines) + "\n"


def table(head: Line, lines: Iterable[Line]) -> list[str]:
    """A Markdown table: the first and the last column to the left, numbers to the right."""
    body = ["| " + " | ".join(line) + " |" for line in (head, *lines)]
    return [body[0], f"|---|{'---:|' * (len(head) - 2)}---|", *body[1:]]


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


def _is_about_requests(row: Result) -> bool:
    # Results that were kept before there were such rows lack the key.
    return "requests" in row


def _time_line(row: Result) -> Line:
    if not _is_measured(row):
        return row["title"], "", "", "", *_verdict(row)
    peer = seconds(_median(row["peer"]))
    if row["peer_command"][0] == "python":
        peer += " (Python alone)"
    ours = seconds(_median(row["ours"]))
    return row["title"], peer, ours, f"{row['ratio']:.2f}", *_verdict(row)


def _request_line(row: Result) -> Line:
    if not _is_measured(row):
        return row["title"], "", "", "", "", *_verdict(row)
    peer, ours, api = (_speed(row, side) for side in ("peer", "ours", "api"))
    if row["peer_label"]:
        peer += f" ({row['peer_label']})"
    return row["title"], peer, ours, api, f"{row['ratio']:.2f}", *_verdict(row)


def _verdict(row: Result) -> tuple[str, str]:
    """The goal, and whether it was reached."""
    goal = "" if row["goal"] is None else f"{row['goal']:g}"
    if row["skipped"]:
        return goal, f"not measured: {_cell(row['skipped'])}"
    if row["failed"]:
        return goal, "**no**: the run failed"
    return goal, "" if row["goal"] is None else _yes(row["ratio"] >= row["goal"])


def _speed(row: Result, side: str) -> str:
    """Requests a second; the time of a single one; empty for a side that was not measured."""
    if not row[side]:
        return ""
    taken = _median(row[side])
    return seconds(taken) if row["requests"] == 1 else rate(row["requests"] / max(taken, 1e-9))


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


_REQUESTS_LEGEND = (
    "Requests are timed without the start of the tools, as these report it: 4 KiB unless said "
    "otherwise, one thread, on qemu's side 64 under way. Library: the same loop in a program, with "
    "a flush at the end. What was written was read back by qemu-io."
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


def rate(value: float) -> str:
    """Two or three significant digits: `101 k`, `9.5 k`, `847`."""
    if value >= 1000:
        return f"{value / 1000:.{0 if value >= 99_950 else 1}f} k"
    return f"{value:.{0 if value >= 9.95 else 1}f}"


def _megabytes(value: float) -> str:
    return f"{value / MB:.0f} MB"


def _cell(text: str) -> str:
    """Text that cannot end a table cell."""
    return " ".join(text.replace("|", "/").split())


def _yes(reached: bool) -> str:
    return "yes" if reached else "**no**"
