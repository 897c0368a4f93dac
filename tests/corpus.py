"""The corpus of disk images with known content: where it lies, what it says, and its files.

It is looked for beside the project, and then within it (a part of it, for those who have only the
project). Where there is neither, the tests that need it are skipped."""

from __future__ import annotations

import gzip
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

Entry = dict[str, Any]
_PROJECT = Path(__file__).resolve().parent.parent
_PLACES = (_PROJECT.parent / "shared" / "corpus", _PROJECT / "tests" / "data" / "corpus")


@cache
def corpus_root() -> Path | None:
    """The folder with `manifest.json`, or None where there is no corpus."""
    return next((place for place in _PLACES if (place / "manifest.json").is_file()), None)


def sound_images(**wanted: str) -> list[Entry]:
    """Entries of the sound images with these values, such as `format="qcow2"`."""
    return _entries(".", wanted)


def bad_images(**wanted: str) -> list[Entry]:
    """Entries of the malformed images; their files are in the folder `bad`."""
    return _entries("bad", wanted)


def unpack(entry: Entry, into: Path) -> Path:
    """Write an image and the files that it reads into a folder, without holes. Its path there."""
    root = corpus_root()
    assert root is not None, "an entry without a corpus"
    folder = root / entry["folder"]
    for name in [entry["file"], *_needs(entry)]:
        _write(folder, name, into / name)
    return into / str(entry["file"])


def entry_id(entry: Entry) -> str:
    """For `ids=` of a parametrised test."""
    return str(entry["name"])


def _entries(folder: str, wanted: dict[str, str]) -> list[Entry]:
    return [
        entry
        for entry in _manifest(folder)
        if all(entry.get(key) == value for key, value in wanted.items())
    ]


@cache
def _manifest(folder: str) -> tuple[Entry, ...]:
    root = corpus_root()
    if root is None:
        return ()
    entries = json.loads((root / folder / "manifest.json").read_text(encoding="utf-8"))
    present = (entry for entry in entries if (root / folder / entry["stored"]).is_file())
    return tuple({**entry, "folder": folder} for entry in present)


def _needs(entry: Entry) -> list[str]:
    names: list[str] = entry.get("open", entry).get("needs", [])
    return names


def _write(folder: Path, name: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if (folder / name).is_file():
        shutil.copyfile(folder / name, target)
        return
    with gzip.open(folder / f"{name}.gz", "rb") as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 20)
