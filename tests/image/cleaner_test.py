"""Memory of idle disks: what is dropped, what stays, and how it ends."""

from __future__ import annotations

import threading
from pathlib import Path

import qcowkit
from qcowkit.engine.options import OpenOptions
from qcowkit.image.chain import Chain
from qcowkit.image.cleaner import CacheCleaner
from qcowkit.image.qcow2 import Qcow2Image
from qcowkit.image.registry import open_chain
from qcowkit.testing.qcow2_builder import Data, build_qcow2
from qcowkit.units import KiB


def make(path: Path) -> Path:
    path.write_bytes(build_qcow2(clusters={0: Data(payload=b"x" * 64 * KiB)}).to_bytes())
    return path


def cached(chain: Chain) -> int:
    image = chain.images[0]
    assert isinstance(image, Qcow2Image)
    return len(image.mapping.tables.cache)


def test_tables_that_nobody_used_between_two_ticks_are_dropped(tmp_path: Path) -> None:
    with qcowkit.open(make(tmp_path / "disk.qcow2")) as chain:
        cleaner = CacheCleaner(chain.images, interval=600)
        chain.read(offset=0, length=512)
        cleaner.tick()
        assert cached(chain) == 1
        cleaner.tick()
        assert cached(chain) == 0


def test_tables_that_are_used_stay(tmp_path: Path) -> None:
    with qcowkit.open(make(tmp_path / "disk.qcow2")) as chain:
        cleaner = CacheCleaner(chain.images, interval=600)
        for _ in range(3):
            chain.read(offset=0, length=512)
            cleaner.tick()
        assert cached(chain) == 1


def test_changed_tables_stay_until_they_are_written(tmp_path: Path) -> None:
    path = make(tmp_path / "disk.qcow2")
    with open_chain(path, format="qcow2", writable=True) as chain:
        cleaner = CacheCleaner(chain.images, interval=600)
        chain.write_zeroes(offset=0, length=64 * KiB)
        cleaner.tick()
        cleaner.tick()
        assert cached(chain) == 1
        chain.flush()
        cleaner.tick()
        cleaner.tick()
        assert cached(chain) == 0
        assert chain.read(offset=0, length=512) == bytes(512)


def names() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


def test_a_disk_has_one_cleaner_which_ends_with_it(tmp_path: Path) -> None:
    before = names().count("qcowkit-cache-cleaner")
    with qcowkit.open(make(tmp_path / "disk.qcow2")):
        assert names().count("qcowkit-cache-cleaner") == before + 1
    assert names().count("qcowkit-cache-cleaner") == before


def test_an_interval_of_zero_means_never(tmp_path: Path) -> None:
    before = names().count("qcowkit-cache-cleaner")
    options = OpenOptions(cache_clean_interval=0)
    with open_chain(make(tmp_path / "disk.qcow2"), options=options):
        assert names().count("qcowkit-cache-cleaner") == before


def test_the_thread_cleans_by_itself(tmp_path: Path) -> None:
    done = threading.Event()

    class Image:
        def clean(self) -> None:
            done.set()

    image = Image()
    cleaner = CacheCleaner([image], interval=0.001)
    cleaner.start()
    assert done.wait(10)
    cleaner.stop()
