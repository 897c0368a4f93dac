"""The qcow2 header, and what it says of itself."""

from __future__ import annotations

from fuzz.images import qcow2_bases
from qcowkit.codecs.qcow2.header import Header


def target(data: bytes) -> None:
    """data: the first bytes of a file."""
    header = Header.decode(data)
    header.check()
    again = Header.decode(header.encode() + data[header.header_length :])
    assert again == header, "encoding changes the header"


def seeds() -> list[bytes]:
    """The heads of sound images."""
    return [base[:120] for base in qcow2_bases()]
