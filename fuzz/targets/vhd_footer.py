"""The VHD footer."""

from __future__ import annotations

from fuzz.images import vhd_bases
from qcowkit.codecs.vhd.footer import Footer
from qcowkit.testing.vhd_builder import seal_footer


def target(data: bytes) -> None:
    """data: odd for a mended checksum (1 byte), then the footer."""
    raw = bytearray(data[1:])
    if data[:1] and data[0] & 1 and len(raw) >= 512:
        seal_footer(raw)
    footer = Footer.decode(bytes(raw))
    footer.virtual_size()
    assert Footer.decode(footer.encode()) == footer, "encoding changes the footer"


def seeds() -> list[bytes]:
    """The footers of sound disks."""
    return [b"1" + base[-512:] for base in vhd_bases()]
