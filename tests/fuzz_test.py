"""The fuzz targets on their seeds, the kept corpus and some hundred inputs, always the same."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz.mutate import MAX_LENGTH, mutate
from fuzz.registry import CORPUS, TARGETS, Target
from fuzz.run import fuzz, outcome

MUTATIONS = 250
every_target = pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))


@every_target
def test_the_seeds_are_sound(target: Target) -> None:
    found = {outcome(target, data) for data in target.seeds()}
    assert "" in found, "no seed is accepted: the mutations would test refusals only"


@every_target
def test_only_our_errors_leave_a_decoder(target: Target) -> None:
    corpus = target.corpus()
    for data in corpus:
        outcome(target, data)
    noise = random.Random(target.name)
    for _ in range(MUTATIONS):
        outcome(target, mutate(noise.choice(corpus), noise=noise, others=corpus))


@every_target
@settings(
    max_examples=40,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.binary(max_size=700))
def test_only_our_errors_leave_a_decoder_of_noise(target: Target, data: bytes) -> None:
    outcome(target, data)


def test_every_kept_input_belongs_to_a_target() -> None:
    assert {path.parent.name for path in CORPUS.rglob("*.hex")} <= set(TARGETS)
    for path in CORPUS.rglob("*.hex"):
        data = bytes.fromhex(path.read_text(encoding="ascii"))
        assert path.stem == hashlib.sha256(data).hexdigest()[:16]


def test_every_module_of_targets_is_registered() -> None:
    folder = Path(__file__).resolve().parent.parent / "fuzz" / "targets"
    names = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert names == set(TARGETS)


def test_a_mutation_is_bounded_and_repeatable() -> None:
    found = [mutate(b"abc" * 9000, noise=random.Random(seed), others=[b"x"]) for seed in (1, 1, 2)]
    assert found[0] == found[1] != found[2]
    assert max(map(len, found)) <= MAX_LENGTH


@pytest.mark.soak
@every_target
def test_a_decoder_stands_a_minute_of_fuzzing(target: Target) -> None:
    assert fuzz(target, seconds=60, seed=1) > 1000
