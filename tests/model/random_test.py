"""The same guest without hypothesis: a seed, a loop, and far more requests in the same time."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.model.driver import Driver, place_range
from tests.model.kinds import KINDS, ModelKind
from tests.peers import run_peer

STEPS = 300
LONG_STEPS = 30_000
# Requests of one disk before a new one is made.
_LIFE = 400
# How often each request comes, relative to the others.
WEIGHTS: Mapping[str, int] = {
    "write": 16,
    "write_compressed": 6,
    "write_zeroes": 6,
    "discard": 6,
    "read": 6,
    "flush": 2,
    "reopen": 2,
    "resize": 2,
    "clean": 1,
}


class Chance:
    """Requests of one seed."""

    def __init__(self, driver: Driver, seed: int) -> None:
        self.driver = driver
        self.noise = random.Random(seed)
        self._names, self._weights = list(WEIGHTS), list(WEIGHTS.values())

    def step(self) -> None:
        """The next request."""
        noise, driver = self.noise, self.driver
        (name,) = noise.choices(self._names, self._weights)
        if name == "resize":
            self._resize()
            return
        if name in ("flush", "reopen", "clean"):
            getattr(driver, name)()
            return
        offset, length = place_range(
            driver,
            place=noise.getrandbits(16),
            extent=noise.getrandbits(16),
            scale=noise.choice((0, 0, 0, 1, 1, 2)),
            unit=noise.choice((0, 1, 2, 3, 3)),
        )
        more: dict[str, int | bool] = {}
        if name.startswith("write"):
            more["seed"] = noise.getrandbits(16)
        if name == "write_compressed":
            more["discard"] = noise.random() < 0.6
        if name == "write_zeroes":
            more = {"unmap": noise.random() < 0.5, "fallback": noise.random() < 0.7}
        getattr(driver, name)(offset=offset, length=length, **more)

    def _resize(self) -> None:
        kind, noise = self.driver.kind, self.noise
        size = noise.randrange(kind.capacity)
        if noise.random() < 0.3:
            size -= size % kind.cluster_size
        mode = noise.choice(("off", "off", "off", "metadata", "falloc", "full"))
        self.driver.resize(size, preallocation=mode)


def run_random(kind: ModelKind, *, seed: int, steps: int) -> Driver:
    """Make `steps` requests of a new disk, and close it."""
    driver = Driver(kind)
    chance = Chance(driver, seed)
    try:
        while driver.steps < steps:
            chance.step()
        driver.close()
    except BaseException as error:
        error.add_note(f"{kind.name!r}, seed {seed}, step {driver.steps}; the last requests were")
        for text in driver.history:
            error.add_note(f"  {text}")
        raise
    return driver


@pytest.mark.parametrize("name", KINDS)
def test_a_random_guest_finds_an_array_of_bytes(name: str) -> None:
    run_random(KINDS[name], seed=1, steps=STEPS)


@pytest.mark.soak
@pytest.mark.parametrize("name", KINDS)
def test_many_random_guests_find_arrays_of_bytes(name: str) -> None:
    for seed in range(LONG_STEPS // _LIFE):
        run_random(KINDS[name], seed=1000 + seed, steps=_LIFE)


@pytest.mark.peer("qemu-img")
@pytest.mark.parametrize("name", KINDS)
def test_qemu_finds_the_image_sound_and_reads_the_same(name: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    driver = run_random(kind, seed=2, steps=STEPS // 2)
    image = tmp_path / "image"
    image.write_bytes(driver.files.image.to_bytes())
    options = f"driver=qcow2,file.driver=file,file.filename={image}"
    if driver.files.data is not None:
        # The name in the image begins at the working directory in some versions of qemu.
        (tmp_path / "data").write_bytes(driver.files.data.to_bytes())
        options += f",data-file.driver=file,data-file.filename={tmp_path / 'data'}"
    if kind.base is not None:
        (tmp_path / "base").write_bytes(kind.base.to_bytes())
    secret: tuple[str, ...] = ()
    if kind.secret is not None:
        secret = ("--object", f"secret,id=s,data={kind.secret.decode()}")
        options += ",encrypt.key-secret=s"
    run_peer("qemu-img", "check", *secret, "--image-opts", options)
    raw = tmp_path / "raw"
    run_peer("qemu-img", "convert", *secret, "--image-opts", options, "-O", "raw", raw)
    assert driver.model.find_difference(raw.read_bytes()) is None
    assert raw.stat().st_size == driver.size
