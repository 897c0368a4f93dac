"""docs/requirements.md: complete, and true; and the items that the tree as a whole must show."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from qcowkit.codecs.qcow2.entries import (
    COMPRESSED,
    COPIED,
    L1_RESERVED,
    L2_RESERVED,
    OFFSET_MASK,
)
from qcowkit.codecs.qcow2.geometry import Geometry
from qcowkit.engine.qcow2.l2_writer import L2Writer
from qcowkit.engine.qcow2.layout import plan_layout
from qcowkit.extents.table import concatenate
from qcowkit.image.registry import open_chain
from qcowkit.storage.memory import MemoryStorage
from qcowkit.testing.qcow2_builder import Zero, build_qcow2
from qcowkit.testing.strategies import per_byte
from qcowkit.units import KiB, MiB, TiB
from tests.command import qcow

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "qcowkit"

ITEMS = [
    *(f"S000-{number}" for number in range(1, 14)),
    *(f"S001-{number:02}" for number in range(1, 39)),
    *(f"S002-{number:02}" for number in range(1, 20)),
    *(f"S003-{number:02}" for number in range(1, 43)),
    *(f"S004-{number:02}" for number in range(1, 20)),
]
MILESTONES = (
    "milestone 3: management",
    "milestone 4: streams",
    "milestone 5: NBD",
    "milestone 6: service",
)
_PARTS = (
    "format map alloc cache write crypt bitmap snapshot resize check chain stream headers vhd "
    "http cli bench kit -"
)
PARTS = set(_PARTS.split())
# What milestone 1 brings whole.
OWN = {"format", "map", "headers", "cli", "kit"}
# Rows of these parts that stand on verbs of later milestones: the commands that stand in for
# others, identity, the L2-less form.
LATER = {
    "S002-17": "streams",
    "S004-11": "stand-in commands",
    "S004-13": "stand-in commands",
    "S004-14": "stand-in commands",
    "S004-17": "stand-in commands",
}

Row = tuple[str, set[str], list[str], list[str]]


@cache
def rows() -> tuple[Row, ...]:
    """(item, parts, named tests, named milestones) of every row."""
    found = []
    for line in (ROOT / "docs" / "requirements.md").read_text(encoding="utf-8").splitlines():
        if not line.startswith("| S00"):
            continue
        item, _, part, shown = (cell.strip() for cell in line.strip("|").split(" | "))
        tests = re.findall(r"`(tests/[\w/]+\.py::\w+)`", shown)
        milestones = re.findall(r"milestone \d: \w+(?: engine)?", shown)
        found.append((item, set(part.split(", ")), tests, milestones))
    return tuple(found)


def test_every_item_has_one_row() -> None:
    assert [item for item, *_ in rows()] == ITEMS


def test_parts_and_milestones_are_known_ones() -> None:
    for item, parts, _, milestones in rows():
        assert parts <= PARTS, item
        assert set(milestones) <= set(MILESTONES), item


def test_every_row_is_shown_or_promised() -> None:
    assert [item for item, _, tests, milestones in rows() if not tests and not milestones] == []


def test_what_this_milestone_brings_is_shown_by_tests() -> None:
    wrong = [
        item
        for item, parts, tests, milestones in rows()
        if item not in LATER and parts & OWN and (not tests or (parts <= OWN and milestones))
    ]
    assert wrong == []


def test_an_exception_is_one() -> None:
    promised = {item: milestones for item, _, _, milestones in rows()}
    assert [item for item in LATER if not promised[item]] == []


@cache
def functions_of(name: str) -> frozenset[str]:
    """The names of all functions of a test file, methods included."""
    path = ROOT / name
    if not path.is_file():
        return frozenset()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def test_every_test_that_is_named_exists() -> None:
    named = {test for _, _, tests, _ in rows() for test in tests}
    wrong = [
        test
        for test in sorted(named)
        if test.partition("::")[2] not in functions_of(test.partition("::")[0])
    ]
    assert wrong == []


# Items that are about the tree.


@cache
def trees() -> dict[str, ast.Module]:
    """Every module of the package by its path."""
    return {
        str(path.relative_to(SOURCE)): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(SOURCE.rglob("*.py"))
    }


def public_functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    for name, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                yield name, node


def test_one_module_writes_the_list_of_allocated_clusters() -> None:
    """S000-11."""
    wanted = re.compile(r"""["']data_clusters["']""")
    found = [name for name in trees() if wanted.search((SOURCE / name).read_text("utf-8"))]
    assert found == ["operations/headers.py"]


def test_the_package_starts_no_other_program() -> None:
    """S000-12; but the crash experiments, which are for tests, may ask another checker."""
    starters = {"subprocess", "multiprocessing", "pty"}
    found = [
        name
        for name, tree in trees().items()
        if name != "testing/crash_oracle.py"
        for node in ast.walk(tree)
        if (isinstance(node, ast.Import) and {one.name for one in node.names} & starters)
        or (isinstance(node, ast.ImportFrom) and node.module in starters)
        or (isinstance(node, ast.Attribute) and node.attr in ("system", "popen", "execv"))
    ]
    assert found == []


def test_only_the_codec_knows_the_bits_of_an_l2_word() -> None:
    """S001-04: elsewhere their names are used, never the numbers."""
    masks = {COPIED, COMPRESSED, OFFSET_MASK, L1_RESERVED, L2_RESERVED}
    found = []
    for name, tree in trees().items():
        # inspect is free of numpy, so that it cannot load the codec of L2 words.
        outside = name.startswith(("engine/qcow2", "image", "operations"))
        if not outside or name == "operations/inspect.py":
            continue
        for node in ast.walk(tree):
            spelled = isinstance(node, ast.Constant) and node.value in masks
            shifted = (
                isinstance(node, ast.BinOp)
                and isinstance(node.op, ast.LShift)
                and isinstance(node.left, ast.Constant)
                and isinstance(node.right, ast.Constant)
                and node.left.value << node.right.value in masks
            )
            if spelled or shifted:
                found.append(f"{name}:{node.lineno}")
    assert found == []


def test_one_enumeration_names_the_states_of_clusters() -> None:
    """S001-12, S001-34."""
    found = [
        node.name
        for name, tree in trees().items()
        if name.startswith(("codecs", "engine", "image"))
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for line in node.body
        if isinstance(line, ast.Assign) and getattr(line.targets[0], "id", "") == "COMPRESSED"
    ]
    assert found == ["SubclusterState"]


def test_extended_entries_without_their_bitmaps_are_a_programming_error() -> None:
    """S001-10, S001-29."""
    geometry = Geometry(cluster_bits=14, extended_l2=True)
    layout = plan_layout(geometry, size=MiB, l2_tables=1, data_clusters=1)
    writer = L2Writer(MemoryStorage(), layout, fill=None)
    with pytest.raises(AssertionError, match="extended L2 entries come with bitmaps"):
        writer.put(0, np.array([COPIED | 0x40000], np.uint64), None)


def test_subclusters_in_small_clusters_are_refused_with_the_reason(tmp_path: Path) -> None:
    """S001-25."""
    options = "extended_l2=on,cluster_size=8k"
    done = qcow("create", "-f", "qcow2", "-o", options, tmp_path / "new.qcow2", "1M", code=1)
    assert "extended_l2 needs a cluster_size of at least 16384, found 8192" in done.err
    assert list(tmp_path.iterdir()) == []


def test_preallocation_over_a_base_needs_subclusters(tmp_path: Path) -> None:
    """S001-30."""
    flags = ["-u", "-b", "base.raw", "-F", "raw", "-o", "preallocation=metadata"]
    done = qcow("create", "-f", "qcow2", *flags, tmp_path / "new.qcow2", "1M", code=1)
    assert "preallocation with a backing file needs extended_l2=on" in done.err


def test_large_sizes_are_spelled_with_units() -> None:
    """S003-04."""
    found = [
        f"{name}:{node.lineno}"
        for name, tree in trees().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, int)
        and node.value >= MiB
        and node.value % MiB == 0
        and not _is_hexadecimal(name, node)
    ]
    assert found == []


def _is_hexadecimal(name: str, node: ast.Constant) -> bool:
    line = (SOURCE / name).read_text(encoding="utf-8").splitlines()[node.lineno - 1]
    return line[node.col_offset :].startswith("0x")


def test_a_part_of_an_l2_table_can_be_mapped_by_itself(tmp_path: Path) -> None:
    """S003-15."""
    clusters = {0: b"a", 1: b"b", 7: Zero(), 30: b"c", 63: b"d"}
    path = tmp_path / "disk.qcow2"
    path.write_bytes(build_qcow2(cluster_bits=9, size=32 * KiB, clusters=clusters).to_bytes())
    with open_chain(path, format="qcow2") as disk:
        parts = [disk.extents(start=at, length=KiB) for at in range(0, disk.size, KiB)]
        assert per_byte(concatenate(parts)) == per_byte(disk.extents())


def test_the_name_of_a_function_says_what_it_does() -> None:
    """S003-42: `iter_` is lazy, `load_` and `store_` reach storage, `plan_` and codecs do not."""
    wrong = []
    for name, node in public_functions():
        verb = node.name.partition("_")[0]
        result = ast.unparse(node.returns) if node.returns else ""
        reaches = any("Storage" in ast.unparse(arg.annotation or node) for arg in arguments(node))
        if verb == "iter" and not result.startswith(("Iterator", "Iterable", "Generator")):
            wrong.append(f"{name}: {node.name} returns {result}")
        if verb in ("load", "store") and name.startswith(("codecs", "extents")):
            wrong.append(f"{name}: {node.name} in a pure module")
        if verb in ("plan", "encode", "decode") and reaches:
            wrong.append(f"{name}: {node.name} takes a storage")
    assert wrong == []


def arguments(node: ast.FunctionDef) -> list[ast.arg]:
    """Those with an annotation."""
    found = [*node.args.args, *node.args.kwonlyargs]
    return [argument for argument in found if argument.annotation is not None]


def test_a_disk_of_8_tib_survives_qcow2_and_no_vhd_is_made_of_it(tmp_path: Path) -> None:
    """S004-01."""
    raw = tmp_path / "disk.raw"
    with raw.open("wb") as file:
        try:
            file.truncate(8 * TiB)
        except OSError:
            pytest.skip("the file system has no files of 8 TiB")
        file.write(b"first")
        file.seek(8 * TiB - 512)
        file.write(b"last".ljust(512, b"!"))
    packed, plain = tmp_path / "packed.qcow2", tmp_path / "plain.qcow2"
    qcow("convert", "-c", "-f", "raw", "-O", "qcow2", raw, packed)
    qcow("convert", "-O", "qcow2", packed, plain)
    assert qcow("compare", "-f", "raw", "-F", "qcow2", raw, plain).code == 0
    assert qcow("check", plain).code == 0
    done = qcow("convert", "-f", "raw", "-O", "vpc", raw, tmp_path / "disk.vhd", code=1)
    assert "above the largest VHD" in done.err
    assert not (tmp_path / "disk.vhd").exists()


def test_one_package_brings_the_command() -> None:
    """S004-12."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["scripts"] == {"qcow": "qcowkit.cli.main:process"}
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["src/qcowkit"]
    assert (SOURCE / "cli" / "main.py").is_file()
