"""The LUKS header inside a qcow2 image."""

from __future__ import annotations

from qcowkit.codecs.qcow2.luks_header import LuksHeader
from qcowkit.testing.qcow2_builder import make_luks_area

_LENGTH = 2 << 20


def target(data: bytes) -> None:
    """data: the first bytes of the area."""
    header = LuksHeader.decode(data, host_offset=0x10000, length=_LENGTH)
    assert header.cipher_name
    assert header.slots
    _ = header.cipher_mode, header.ivgen, header.ivgen_hash


def seeds() -> list[bytes]:
    """Two widths of key, and another mode."""
    areas = [make_luks_area(), make_luks_area(key_bytes=32, mode="cbc-essiv:sha256", active=(0, 7))]
    return [area[:592] for area in areas]
