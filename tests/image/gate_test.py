"""The reference gate: what is admitted, what is refused, and that a refusal betrays nothing."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcowkit.errors import QcowkitError, ReferenceDenied, StorageError
from qcowkit.image.gate import ReferenceGate, below, is_plain_path
from qcowkit.references import Reference, ReferenceKind

BELOW = ReferenceGate.below_image()


def backing(*names: str) -> Reference:
    return Reference(kind=ReferenceKind.BACKING, names=names, format="raw")


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """images/{disk,base}, images/deep/base, and what is not theirs: secret, private/."""
    root = tmp_path.resolve()
    for place in ("images/deep", "private"):
        (root / place).mkdir(parents=True)
    for name in ("images/disk", "images/base", "images/deep/base", "secret", "private/secret"):
        (root / name).write_text(name)
    return root


def content(gate: ReferenceGate, house: Path, *names: str, directory: str = "images") -> str:
    storage = gate.admit(backing(*names), directory=house / directory)
    try:
        return storage.pread(100, offset=0).decode()
    finally:
        storage.close()


def refusal(gate: ReferenceGate, house: Path, *names: str, directory: str = "images") -> str:
    with pytest.raises(ReferenceDenied) as caught:
        gate.admit(backing(*names), directory=house / directory)
    return str(caught.value)


@pytest.mark.parametrize("name", ["base", "./base", "deep/../base", "deep/./..//base"])
def test_a_file_below_the_image_is_admitted(house: Path, name: str) -> None:
    assert content(BELOW, house, name) == "images/base"


def test_an_absolute_name_below_the_image_is_admitted(house: Path) -> None:
    assert content(BELOW, house, f"{house}/images/deep/base") == "images/deep/base"


def test_the_path_of_the_result_starts_at_the_naming_image(house: Path) -> None:
    with BELOW.admit(backing("deep/base"), directory=house / "images") as storage:
        assert storage.path == f"{house}/images/deep/base"
        assert not storage.caps.writable


def test_a_writable_file_is_opened_where_that_was_asked(house: Path) -> None:
    with BELOW.admit(backing("base"), directory=house / "images", writable=True) as storage:
        assert storage.caps.writable


def test_the_refusal_names_the_reference_the_rule_and_the_way_out(house: Path) -> None:
    assert refusal(BELOW, house, "../secret") == (
        f"backing file '../secret': not admitted: only files below {house}/images may be named "
        "(see --allow)"
    )


OUTSIDE = [
    "../secret",
    "/etc/passwd",
    "..",
    ".",
    "",
    "base/",
    "deep/..",
    "../images2/base",
    "deep/../../secret",
    "../private/../secret",
    "nbd:localhost:10809",
    "nbd://localhost/disk",
    'json:{"driver":"raw","file":{"filename":"/etc/passwd"}}',
    "file:base",
    "fat:rw:/tmp",
    "http://169.254.169.254/latest",
    "c:\\base",
    "ba\nse",
    "ba\0se",
    "base\x1b[2J",
    "base\x9b2J",
    "ba\ud800se",
    "a" * 5000,
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_outside_and_names_that_are_no_paths_are_refused(house: Path, name: str) -> None:
    refusal(BELOW, house, name)


def test_a_name_is_refused_before_the_host_is_asked_anything(
    house: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, object]] = []
    own = {str(house / "images"), *map(str, (house / "images").parents)}

    def watch(*arguments: object, **_: object) -> None:
        asked.append(("call", arguments[0]))
        raise AssertionError(f"asked for {arguments[0]!r}")

    for name in ("open", "readlink"):
        monkeypatch.setattr(os, name, watch)
    lstat = os.lstat
    # Only the image's own directory is looked up, by whatever name it was given.
    monkeypatch.setattr(os, "lstat", lambda path: lstat(path) if path in own else watch(path))
    for name in OUTSIDE:
        refusal(BELOW, house, name)
    assert asked == []


def test_control_characters_of_a_name_do_not_reach_the_message(house: Path) -> None:
    text = refusal(BELOW, house, "../\x1b[2J\n\u202ebase")
    assert text.isprintable()


def make_unreadable(path: Path) -> None:
    path.touch()
    path.chmod(0)


ORACLE_SETUPS: list[Callable[[Path], object]] = [
    lambda path: path.write_text("there"),
    lambda path: path.mkdir(),
    lambda path: os.mkfifo(path),
    lambda path: path.symlink_to("nowhere"),
    make_unreadable,
]
ORACLE_NAMES: list[Callable[[Path], str]] = [
    lambda house: "../target",
    lambda house: f"{house}/target",
    lambda house: "deep/../../target",
    lambda house: "link-to-target",
    lambda house: "up/target",
    lambda house: f"{house}/target/x/../../target",
]


@pytest.mark.parametrize(
    ("setup", "name"),
    list(itertools.product(range(len(ORACLE_SETUPS)), range(len(ORACLE_NAMES)))),
)
def test_a_refusal_does_not_tell_what_exists(house: Path, setup: int, name: int) -> None:
    (house / "images" / "link-to-target").symlink_to("../target")
    (house / "images" / "up").symlink_to("..")
    named = ORACLE_NAMES[name](house)
    absent = refusal(BELOW, house, named)
    ORACLE_SETUPS[setup](house / "target")
    assert refusal(BELOW, house, named) == absent


@pytest.mark.parametrize(
    "target", ["base", "deep/base", "./deep/../base", "{house}/images/base", "second"]
)
def test_a_link_that_stays_below_the_image_is_followed(house: Path, target: str) -> None:
    (house / "images" / "second").symlink_to("base")
    (house / "images" / "link").symlink_to(target.format(house=house))
    assert content(BELOW, house, "link").endswith("base")


def test_a_link_to_a_directory_is_followed_and_leads_back_as_the_kernel_would(house: Path) -> None:
    (house / "images" / "deep" / "deeper").mkdir()
    (house / "images" / "short").symlink_to("deep/deeper")
    assert content(BELOW, house, "short/../base") == "images/deep/base"


@pytest.mark.parametrize(
    "target", ["../secret", "{house}/secret", "/etc/passwd", "deep/../../secret", "..", "/"]
)
def test_a_link_that_leads_out_is_refused(house: Path, target: str) -> None:
    (house / "images" / "link").symlink_to(target.format(house=house))
    refusal(BELOW, house, "link")
    refusal(BELOW, house, "link/secret")


def test_a_link_that_leads_out_and_back_in_is_judged_by_where_it_ends(house: Path) -> None:
    (house / "images" / "link").symlink_to("../images/base")
    assert content(BELOW, house, "link") == "images/base"
    (house / "images" / "winding").symlink_to("../private/../images/base")
    refusal(BELOW, house, "winding")


def test_links_in_a_circle_come_to_an_end(house: Path) -> None:
    (house / "images" / "one").symlink_to("two")
    (house / "images" / "two").symlink_to("one")
    with pytest.raises(StorageError) as caught:
        BELOW.admit(backing("one"), directory=house / "images")
    assert caught.value.errno == errno.ELOOP


def test_a_missing_file_below_the_image_is_a_plain_failure_in_the_images_own_words(
    house: Path,
) -> None:
    with pytest.raises(StorageError) as caught:
        BELOW.admit(backing("deep/nothing"), directory=house / "images")
    assert str(caught.value) == (
        "backing file 'deep/nothing': open: No such file or directory (ENOENT)"
    )


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (os.mkdir, "is a directory"),
        (os.mkfifo, "is a pipe"),
        (lambda path: path.symlink_to("deep"), "is a directory"),
    ],
)
def test_only_regular_files_are_opened(
    house: Path, make: Callable[[Path], None], text: str
) -> None:
    make(house / "images" / "thing")
    with pytest.raises(StorageError, match=f"backing file 'thing': open: {text}, expected a reg"):
        BELOW.admit(backing("thing"), directory=house / "images")


def test_the_file_that_was_looked_at_is_the_file_that_is_opened(
    house: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stat = os.stat

    def swap(path: str, **options: Any) -> os.stat_result:
        found = stat(path, **options)
        if path == "base":
            os.unlink(house / "images" / "base")
            os.symlink(house / "secret", house / "images" / "base")
        return found

    monkeypatch.setattr(os, "stat", swap)
    with pytest.raises(StorageError) as caught:
        BELOW.admit(backing("base"), directory=house / "images")
    assert caught.value.errno == errno.ELOOP


def test_an_allowed_directory_widens_the_gate(house: Path) -> None:
    gate = ReferenceGate.below_image(allow=[house / "private"])
    assert content(gate, house, "../private/secret") == "private/secret"
    assert content(gate, house, f"{house}/private/secret") == "private/secret"
    text = refusal(gate, house, "../secret")
    assert f"only files below {house}/images, {house}/private may be named" in text


def test_a_link_may_lead_into_an_allowed_directory(house: Path) -> None:
    (house / "images" / "link").symlink_to("../private/secret")
    gate = ReferenceGate.below_image(allow=[house / "private"])
    assert content(gate, house, "link") == "private/secret"


def test_an_allowed_parent_directory_covers_its_whole_tree(house: Path) -> None:
    gate = ReferenceGate.below_image(allow=[house])
    assert content(gate, house, "../secret") == "secret"
    assert content(gate, house, "../base", directory="images/deep") == "images/base"


def test_the_root_of_the_host_may_be_allowed(house: Path) -> None:
    gate = ReferenceGate.below_image(allow=["/"])
    assert content(gate, house, f"{house}/secret") == "secret"
    assert content(gate, house, "../" * 40 + str(house / "secret").lstrip("/")) == "secret"


def test_a_neighbour_with_a_longer_name_is_not_below(house: Path) -> None:
    (house / "images2").mkdir()
    (house / "images2" / "base").touch()
    refusal(BELOW, house, f"{house}/images2/base")


def test_a_directory_reached_through_a_link_counts_by_both_its_names(house: Path) -> None:
    (house / "current").symlink_to("images")
    for name in ("base", f"{house}/current/base", f"{house}/images/base", "../images/base"):
        assert content(BELOW, house, name, directory="current") == "images/base"


def test_a_relative_directory_means_the_working_directory(
    house: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(house / "images")
    with BELOW.admit(backing("base"), directory=Path()) as storage:
        assert storage.pread(100, offset=0) == b"images/base"
    with pytest.raises(ReferenceDenied, match=r"only files below \. may be named"):
        BELOW.admit(backing("../secret"), directory=Path())


def test_deny_all_refuses_even_what_lies_beside_the_image(house: Path) -> None:
    text = refusal(ReferenceGate.deny_all(), house, "base")
    assert text == "backing file 'base': not admitted: no reference is followed here"


def test_trust_follows_every_plain_path_and_nothing_else(house: Path) -> None:
    gate = ReferenceGate.trusting()
    assert content(gate, house, "../secret") == "secret"
    assert content(gate, house, f"{house}/private/secret") == "private/secret"
    assert refusal(gate, house, "nbd:localhost:10809").endswith("only plain paths are followed")
    with pytest.raises(StorageError, match="is a character device"):
        gate.admit(backing("/dev/null"), directory=house)


def test_the_first_admitted_candidate_wins(house: Path) -> None:
    assert (
        content(BELOW, house, "/etc/passwd", "nothing", "deep/base", "base") == "images/deep/base"
    )


def test_several_refused_candidates_give_one_refusal(house: Path) -> None:
    text = refusal(BELOW, house, "../secret", "/etc/passwd")
    assert text.startswith("backing file '../secret', '/etc/passwd': not admitted: ")


def test_a_missing_candidate_below_the_image_says_more_than_a_refused_one(house: Path) -> None:
    with pytest.raises(StorageError, match="backing file 'nothing': open: No such file"):
        BELOW.admit(backing("../secret", "nothing"), directory=house / "images")


def test_no_descriptor_is_left_behind(house: Path) -> None:
    (house / "images" / "out").symlink_to("deep/../../secret")
    before = len(os.listdir("/proc/self/fd"))
    for name in ("deep/base", "deep/nothing", "deep/../out", "deep", "base/x"):
        try:
            content(BELOW, house, name)
        except QcowkitError:
            continue
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("kind", list(ReferenceKind))
def test_every_kind_of_reference_is_named_in_its_own_words(
    house: Path, kind: ReferenceKind
) -> None:
    with pytest.raises(ReferenceDenied, match=f"^{kind.value} 'x': not admitted"):
        ReferenceGate.deny_all().admit(Reference(kind=kind, names=("x",)), directory=house)


PARTS = st.lists(st.sampled_from(["..", "a", "b", "c"]), max_size=8).map(tuple)
PLAIN = st.lists(st.sampled_from(["a", "b"]), max_size=3).map(tuple)


def normal(parts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(part for part in os.path.normpath("/" + "/".join(parts)).split("/") if part)


@given(root=PLAIN, start=PLAIN, parts=PARTS)
def test_what_is_below_by_its_letters_is_reached_from_the_root(
    root: tuple[str, ...], start: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    left = below(root, start, parts)
    if left is not None:
        assert normal(start + parts) == normal(root + left)
        assert normal(root + left)[: len(root)] == root


@given(root=PLAIN, start=PLAIN, parts=PLAIN, ups=st.integers(0, 4))
def test_a_name_that_only_leads_upwards_first_is_below_where_its_letters_end_below(
    root: tuple[str, ...], start: tuple[str, ...], parts: tuple[str, ...], ups: int
) -> None:
    name = ("..",) * ups + parts
    where = normal(start + name)
    inside = where[: len(root)] == root and where != root
    if inside:
        assert below(root, start, name) is not None


def test_plain_paths() -> None:
    assert is_plain_path("a/b:c")
    assert is_plain_path("./a:b")
    assert is_plain_path("Ünïcode disk.qcow2")
    assert not is_plain_path("a:b/c")
