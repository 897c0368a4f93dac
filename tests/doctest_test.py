"""The examples in the docstrings of the public modules run as they stand."""

from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "name",
    [
        "qcowkit",
        "qcowkit.image.chain",
        "qcowkit.image.registry",
        "qcowkit.image.gate",
        "qcowkit.extents.table",
        "qcowkit.units",
    ],
)
def test_the_examples_of_a_public_module_run(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_the_chain_has_an_example() -> None:
    assert doctest.testmod(importlib.import_module("qcowkit.image.chain")).attempted
