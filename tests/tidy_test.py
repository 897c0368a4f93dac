"""The law of the house, kept by a walk over the syntax trees: floors, purity, sizes, habits."""

from __future__ import annotations

import ast
import fnmatch
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src"
TREES = ("src", "tests", "demo", "bench", "fuzz", "tools")

MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 600
MAX_COLUMNS = 100
MAX_TRACKED_BYTES = 1 << 20

# docs/architecture.md, "Floors": a module imports from lower floors or from its own package.
FLOORS = {
    "errors": 0,
    "units": 0,
    "budget": 0,
    "references": 0,
    "extents": 1,
    "codecs": 2,
    "storage": 3,
    "engine": 4,
    "image": 5,
    "operations": 6,
    "cli": 7,
}
# Ships with the package, serves the tests, and may look at every floor below the front ends.
OUTSIDE = {"testing"}
# Packages that share a place in the stack and must not know each other.
STRANGERS = (("storage", "codecs"), ("storage", "extents"))

IMPURE = {"os", "io", "socket", "threading", "time"}
PURE = ("errors", "units", "budget", "references", "extents", "codecs")
# Names errno values; touches nothing.
# The names of errno values; contexts of a C library that threads may not share.
IMPURE_ALLOWED = {
    ("qcowkit.errors", "os"),
    ("qcowkit.codecs.qcow2.compression", "threading"),
}

# docs/architecture.md, "Light and heavy modules".
NUMPY_FREE = (
    "qcowkit",
    "qcowkit.errors",
    "qcowkit.units",
    "qcowkit.budget",
    "qcowkit.references",
    "qcowkit.codecs.*",
    "qcowkit.storage.*",
    "qcowkit.engine.*.metadata",
    "qcowkit.image.gate",
    "qcowkit.image.probe",
    "qcowkit.image.metadata",
    "qcowkit.image.lineage",
    "qcowkit.operations.info",
    "qcowkit.operations.inspect",
    "qcowkit.cli.*",
    "qcowkit.cli.commands.info",
    "qcowkit.cli.commands.inspect",
    "qcowkit.cli.commands.completion",
)
NUMPY_ALLOWED = (
    "qcowkit.codecs.qcow2.entries",
    "qcowkit.codecs.qcow2.refcount_block",
    "qcowkit.codecs.qcow2.transitions",
    "qcowkit.codecs.qcow2.recoding",
    "qcowkit.codecs.qcow2.sector_cipher",
    "qcowkit.codecs.qcow2.luks_keys",
    "qcowkit.codecs.qcow2.bitmaps_data",
    "qcowkit.codecs.vhd.bat",
    "qcowkit.cli.opening",
    "qcowkit.cli.commands.*",
)

# The two lazy tables; docs/adr/0004.
LAZY = {"qcowkit", "qcowkit.cli.table"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """One file of the package. `imports`: names of modules, as they load when this one does."""

    name: str
    path: Path
    tree: ast.Module
    imports: set[str] = field(default_factory=set)
    typing_imports: set[str] = field(default_factory=set)


@cache
def package() -> dict[str, Module]:
    """Every module of the package by its dotted name."""
    modules = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules[name] = Module(name=name, path=path, tree=parse(path))
    for module in modules.values():
        collect_imports(module, modules)
    return modules


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@cache
def python_files() -> tuple[Path, ...]:
    return tuple(path for tree in TREES for path in sorted((ROOT / tree).rglob("*.py")))


def collect_imports(module: Module, modules: dict[str, Module]) -> None:
    """Fill the imports of a module; a name of a package that is a module counts as that module."""
    for node, typing_only in module_level_imports(module.tree.body):
        target = module.typing_imports if typing_only else module.imports
        if isinstance(node, ast.Import):
            target.update(alias.name for alias in node.names)
            continue
        assert node.level == 0, f"{module.name}: relative import in line {node.lineno}"
        origin = node.module or ""
        for alias in node.names:
            full = f"{origin}.{alias.name}"
            target.add(full if full in modules else origin)


def module_level_imports(
    body: list[ast.stmt], *, typing_only: bool = False
) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Imports outside of functions and classes, and whether only a type checker sees them."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, typing_only
        elif isinstance(node, ast.If):
            checking = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
            yield from module_level_imports(node.body, typing_only=typing_only or checking)
            yield from module_level_imports(node.orelse, typing_only=typing_only)
        elif isinstance(node, ast.Try):
            blocks = [node.body, node.orelse, node.finalbody, *(h.body for h in node.handlers)]
            for block in blocks:
                yield from module_level_imports(block, typing_only=typing_only)


def own_package(name: str) -> str:
    """`extents` for `qcowkit.extents.table`, `errors` for `qcowkit.errors`, '' for `qcowkit`."""
    return name.partition(".")[2].partition(".")[0]


def place(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


def found_in(
    paths: tuple[Path, ...], wanted: type[ast.AST] | tuple[type[ast.AST], ...]
) -> Iterator[tuple[Path, ast.AST]]:
    for path in paths:
        for node in ast.walk(parse(path)):
            if isinstance(node, wanted):
                yield path, node


def source_files() -> tuple[Path, ...]:
    return tuple(module.path for module in package().values())


def test_every_package_has_a_floor() -> None:
    names = {own_package(name) for name in package()} - {""}
    assert names <= set(FLOORS) | OUTSIDE


def test_imports_go_down_the_floors() -> None:
    wrong = []
    for module in package().values():
        own = own_package(module.name)
        if own in OUTSIDE or not own:
            continue
        for target in module.imports | module.typing_imports:
            other = own_package(target)
            if not target.startswith("qcowkit") or other in ("", own):
                continue
            lower = other not in OUTSIDE and FLOORS[other] < FLOORS[own]
            # The modules of the ground floor are siblings of one another.
            if not lower and not FLOORS[own] == FLOORS.get(other) == 0:
                wrong.append(f"{module.name} imports {target}")
    assert wrong == []


def test_storage_is_blind_to_formats() -> None:
    wrong = [
        f"{module.name} imports {target}"
        for module in package().values()
        for target in module.imports | module.typing_imports
        if (own_package(module.name), own_package(target)) in STRANGERS
    ]
    assert wrong == []


def test_no_import_goes_in_a_circle() -> None:
    modules = package()
    graph = {name: module.imports & modules.keys() - {name} for name, module in modules.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_imports_stand_at_the_top_of_a_module() -> None:
    wrong = []
    for path in python_files():
        tree = parse(path)
        allowed = {id(node) for node, _ in module_level_imports(tree.body)}
        wrong += [
            place(path, node)
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom) and id(node) not in allowed
        ]
    assert wrong == []


def test_only_the_two_tables_import_lazily() -> None:
    users = {name for name, module in package().items() if "importlib" in module.imports}
    assert users == LAZY
    calls = [
        place(path, node)
        for path, node in found_in(source_files(), ast.Name)
        if isinstance(node, ast.Name) and node.id == "__import__"
    ]
    assert calls == []


def test_pure_modules_touch_no_machine() -> None:
    wrong = [
        f"{module.name} imports {target}"
        for module in package().values()
        if own_package(module.name) in PURE
        for target in module.imports
        if target.partition(".")[0] in IMPURE and (module.name, target) not in IMPURE_ALLOWED
    ]
    assert wrong == []


def light_modules() -> list[str]:
    """Modules that must not load numpy."""

    def matches(name: str, patterns: tuple[str, ...]) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    exact = {pattern for pattern in NUMPY_FREE if "*" not in pattern}
    return [
        name
        for name in package()
        if name in exact or (matches(name, NUMPY_FREE) and not matches(name, NUMPY_ALLOWED))
    ]


@pytest.mark.parametrize("name", light_modules())
def test_a_light_module_never_reaches_numpy(name: str) -> None:
    modules = package()
    before = {name: ""}
    queue = [name]
    for current in queue:
        for target in modules[current].imports:
            if target.partition(".")[0] == "numpy":
                path = [current]
                while before[path[-1]]:
                    path.append(before[path[-1]])
                pytest.fail(" <- ".join(["numpy", *path]))
            if target in modules and target not in before:
                before[target] = current
                queue.append(target)


def loads_numpy(*arguments: str) -> bool:
    """Whether a run of `qcow`, in a process of its own, has loaded numpy when it ends."""
    script = (
        "import os, sys; from qcowkit.cli.main import main; main(sys.argv[2:]); "
        "os.write(int(sys.argv[1]), b'yes' if 'numpy' in sys.modules else b'no')"
    )
    reader, writer = os.pipe()
    with open(reader, "rb") as answer:
        try:
            subprocess.run(
                [sys.executable, "-c", script, str(writer), *arguments],
                stdout=subprocess.DEVNULL,
                check=True,
                pass_fds=(writer,),
                env={**os.environ, "PYTHONPATH": str(SOURCE)},
            )
        finally:
            os.close(writer)
        verdict = answer.read()
    assert verdict in (b"yes", b"no")
    return verdict == b"yes"


@pytest.mark.parametrize("arguments", [("--help",), ("info", "--help"), ("--version",)])
def test_help_is_printed_without_numpy(arguments: tuple[str, ...]) -> None:
    assert not loads_numpy(*arguments)


@pytest.mark.parametrize("verb", ["info", "inspect"])
@pytest.mark.parametrize("output", ["human", "json"])
def test_a_raw_disk_is_described_without_numpy(tmp_path: Path, verb: str, output: str) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    assert not loads_numpy(verb, f"--output={output}", str(disk))


def test_the_question_about_numpy_can_be_answered_with_yes(tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    assert loads_numpy("map", "-f", "raw", str(disk))


def test_functions_are_short() -> None:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    wrong = []
    for path, node in found_in(python_files(), functions):
        assert isinstance(node, functions)
        lines = (node.end_lineno or 0) - node.lineno + 1
        if lines > MAX_FUNCTION_LINES:
            wrong.append(f"{place(path, node)} {node.name} has {lines} lines")
    assert wrong == []


def test_files_are_short_and_narrow() -> None:
    wrong = []
    for path in python_files():
        lines = path.read_text(encoding="utf-8").splitlines()
        if len(lines) > MAX_FILE_LINES:
            wrong.append(f"{path.relative_to(ROOT)} has {len(lines)} lines")
        wrong += [
            f"{path.relative_to(ROOT)}:{number} has {len(line)} columns"
            for number, line in enumerate(lines, 1)
            if len(line) > MAX_COLUMNS
        ]
    assert wrong == []


def test_package_files_are_empty() -> None:
    filled = [
        str(path.relative_to(ROOT))
        for path in SOURCE.rglob("__init__.py")
        if path.stat().st_size and path.parent.name != "qcowkit"
    ]
    assert filled == []


def test_annotations_are_postponed_everywhere() -> None:
    wrong = [
        module.name
        for module in package().values()
        if module.tree.body and "__future__" not in module.imports
    ]
    assert wrong == []


def test_only_the_command_line_prints() -> None:
    wrong = [
        place(path, node)
        for path, node in found_in(source_files(), ast.Call)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("print", "input", "breakpoint")
        and "cli" not in path.relative_to(SOURCE / "qcowkit").parts
    ]
    assert wrong == []


def test_nothing_seeks() -> None:
    wrong = [
        place(path, node)
        for path, node in found_in(source_files(), ast.Call)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "seek"
    ]
    assert wrong == []


def test_no_except_is_bare() -> None:
    wrong = [
        place(path, node)
        for path, node in found_in(python_files(), ast.ExceptHandler)
        if isinstance(node, ast.ExceptHandler) and node.type is None
    ]
    assert wrong == []


def test_no_default_can_change() -> None:
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    literals = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
    wrong = []
    for path, node in found_in(python_files(), functions):
        assert isinstance(node, functions)
        defaults = [*node.args.defaults, *(value for value in node.args.kw_defaults if value)]
        wrong += [place(path, value) for value in defaults if isinstance(value, literals)]
    assert wrong == []


def test_nothing_imports_a_star() -> None:
    wrong = [
        place(path, node)
        for path, node in found_in(python_files(), ast.ImportFrom)
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)
    ]
    assert wrong == []


def test_dataclasses_are_frozen_slotted_and_keyword_only() -> None:
    wrong = []
    for path, node in found_in(source_files(), ast.ClassDef):
        assert isinstance(node, ast.ClassDef)
        for decorator in node.decorator_list:
            call = decorator if isinstance(decorator, ast.Call) else None
            target = call.func if call else decorator
            if not (isinstance(target, ast.Name) and target.id == "dataclass"):
                continue
            given = {word.arg for word in call.keywords} if call else set()
            # A private one may be the working state of an algorithm, and change.
            needed = {"slots", "kw_only"} | (set() if node.name.startswith("_") else {"frozen"})
            if not needed <= given:
                wrong.append(f"{place(path, node)} {node.name}")
    assert wrong == []


def test_nothing_is_left_for_later() -> None:
    # Spelled in two parts, so that this line is not found itself.
    marks = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X|NotImplemented" + r"Error)\b")
    wrong = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in python_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if marks.search(line)
    ]
    assert wrong == []


@cache
def tracked_files() -> tuple[Path, ...]:
    """What version control holds; empty in an unpacked archive, which has none."""
    if not (ROOT / ".git").exists():
        return ()
    done = subprocess.run(
        ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    names = done.stdout.decode().split("\0")
    return tuple(path for name in names if name and (path := ROOT / name).is_file())


def test_nothing_generated_is_tracked() -> None:
    generated = {"__pycache__", ".venv", ".demo", "build", "dist", ".hypothesis", ".pytest_cache"}
    wrong = [
        str(path.relative_to(ROOT))
        for path in tracked_files()
        if generated & set(path.relative_to(ROOT).parts) or path.suffix in (".pyc", ".part")
    ]
    assert wrong == []


def test_nothing_large_is_tracked() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} has {path.stat().st_size} bytes"
        for path in tracked_files()
        if path.stat().st_size > MAX_TRACKED_BYTES
    ]
    assert wrong == []


def test_text_files_are_clean() -> None:
    wrong = []
    for path in tracked_files():
        content = path.read_bytes()
        if not content or b"\0" in content or path.name == "LICENSE":
            continue
        name = path.relative_to(ROOT)
        if b"\r" in content:
            wrong.append(f"{name}: carriage return")
        if not content.endswith(b"\n") or content.endswith(b"\n\n"):
            wrong.append(f"{name}: ends with no or with several newlines")
        if re.search(rb"[ \t]\n", content):
            wrong.append(f"{name}: space at the end of a line")
        if re.search(rb"^(<<<<<<<|>>>>>>>) ", content, re.MULTILINE):
            wrong.append(f"{name}: conflict marker")
    assert wrong == []


def test_every_verb_has_a_module_and_every_module_a_verb() -> None:
    table = package()["qcowkit.cli.table"].tree
    verbs = {
        node.value.replace("-", "_")
        for call in ast.walk(table)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Name)
        and call.func.id in ("Verb", "_own")
        for node in [*call.args[:1], *(w.value for w in call.keywords if w.arg == "name")]
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    prefix = "qcowkit.cli.commands."
    assert verbs == {name.removeprefix(prefix) for name in package() if name.startswith(prefix)}
