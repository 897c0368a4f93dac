"""The words of every error: structure, place, found and expected."""

from __future__ import annotations

import errno

import pytest

from qcowkit import errors
from qcowkit.errors import (
    BudgetExceeded,
    CorruptMetadata,
    QcowkitError,
    StorageError,
    UnsupportedFeature,
)


def test_a_corrupt_structure_names_its_place_and_entry() -> None:
    error = CorruptMetadata("L2 table", reason="no", host_offset=0x40000, index=17)
    assert str(error) == "L2 table at host offset 0x40000, entry 17: no"
    assert (error.structure, error.host_offset, error.index) == ("L2 table", 0x40000, 17)


def test_a_corrupt_structure_without_a_place_is_named_alone() -> None:
    assert str(CorruptMetadata("header", reason="10 bytes")) == "header: 10 bytes"


def test_entry_0_at_offset_0_is_a_place() -> None:
    error = CorruptMetadata("footer", reason="no", host_offset=0, index=0)
    assert str(error) == "footer at host offset 0x0, entry 0: no"


def test_a_feature_names_itself_and_keeps_its_bit() -> None:
    error = UnsupportedFeature("dirty", reason="repair it first", bit=0)
    assert (str(error), error.bit) == ("dirty: repair it first", 0)


def test_a_budget_names_value_and_limit() -> None:
    error = BudgetExceeded("L1 table bytes", value=10, limit=9)
    assert str(error) == "L1 table bytes: 10 is above the limit of 9"


def test_a_failure_of_the_host_keeps_its_errno() -> None:
    error = StorageError("write", path="disk", errno=errno.ENOSPC)
    assert str(error) == "disk: write: No space left on device (ENOSPC)"
    assert error.errno == errno.ENOSPC


def test_a_failure_without_a_known_errno_shows_the_number() -> None:
    assert str(StorageError("read", path="disk", errno=9999)).endswith("(9999)")


def test_a_wrapped_failure_without_errno_becomes_eio() -> None:
    error = StorageError.wrap(OSError("odd"), operation="read", path="disk")
    assert str(error) == "disk: read: Input/output error (EIO)"


@pytest.mark.parametrize(
    "name", [name for name in vars(errors) if isinstance(getattr(errors, name), type)]
)
def test_every_error_has_the_one_root(name: str) -> None:
    kind = getattr(errors, name)
    assert kind is QcowkitError or QcowkitError in kind.__bases__
