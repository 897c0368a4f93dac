"""Refcount blocks of every width: decoding and encoding are inverse."""

from __future__ import annotations

from qcowkit.codecs.qcow2.refcount_block import (
    count_used,
    decode_refcounts,
    encode_refcounts,
    view_refcounts,
)


def target(data: bytes) -> None:
    """data: the refcount order (1 byte), then the block."""
    if not data:
        return
    order = data[0] % 7
    raw = data[1 : 1 + (len(data) - 1) // 8 * 8]
    counts = decode_refcounts(raw, order)
    assert len(counts) == len(raw) * 8 >> order, "a count is lost"
    assert (view_refcounts(raw, order) == counts).all(), "two decoders differ"
    assert count_used(raw, order) == int((counts != 0).sum()), "used counts differ"
    assert encode_refcounts(counts, order) == raw, "encoding is not the inverse"


def seeds() -> list[bytes]:
    """One block of each width."""
    return [bytes([order]) + bytes(range(64)) for order in range(7)]
