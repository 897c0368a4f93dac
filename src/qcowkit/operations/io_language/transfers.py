"""Carrying out one request on an open disk, in pieces of bounded memory."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from qcowkit.engine.qcow2.metadata import Qcow2Metadata
from qcowkit.engine.ranges import check_range
from qcowkit.errors import QcowkitError, RequestError, StorageError, UnsupportedFeature
from qcowkit.extents.table import Flag
from qcowkit.image.chain import Chain
from qcowkit.operations.io_language.flight import Span
from qcowkit.operations.io_language.reports import Failure, Outcome, Transfer
from qcowkit.operations.io_language.requests import (
    DiscardRequest,
    ReadRequest,
    Request,
    Verification,
    WriteRequest,
    tile,
)
from qcowkit.units import MiB, align_down, align_up

# Pieces end at multiples of it, so no cluster is cut in two.
_PIECE = 8 * MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """An open disk and how it is used. writethrough: every change is made durable.
    passes_discards: False lets discards do nothing. copy_on_read: see `copy_up`."""

    chain: Chain
    writethrough: bool = False
    passes_discards: bool = True
    copy_on_read: bool = False


def span_of(target: Target, request: Request) -> Span:
    """What a request touches: whole clusters where it may copy or zero them."""
    changes = not isinstance(request, ReadRequest) or target.copy_on_read
    start, stop = request.offset, request.offset + request.length
    if changes:
        size = target.chain.cluster_size
        start, stop = start - start % size, stop + -stop % size
    return Span(start=start, stop=stop, changes=changes)


def carry_out(
    target: Target, request: Request, *, clock: Callable[[], float], begun: float
) -> Outcome:
    """Do it, and say how it went. begun: what `clock` showed when it was asked for."""
    mismatch, dump = None, None
    errors: tuple[str, ...] = ()
    try:
        check_range(start=request.offset, length=request.length, size=target.chain.size)
        if isinstance(request, ReadRequest):
            verb = "read"
            found, dump = _read(target, request)
            if found is not None:
                mismatch, errors = request.verify, (f"{request.command}: {found}",)
        elif isinstance(request, WriteRequest):
            verb = "wrote"
            refusal = _why_not_compressed(target.chain, request)
            if refusal is not None:
                return _failed(request.command, refusal[1], code=refusal[0])
            _write(target, request)
        else:
            verb = "discard"
            assert isinstance(request, DiscardRequest), request
            _discard(target, request)
    except QcowkitError as error:
        return _failed(request.command, str(error), code=errno_of(error))
    report = Transfer(
        request=request, verb=verb, seconds=clock() - begun, mismatch=mismatch, dump=dump
    )
    return Outcome(reports=(report,), errors=errors, failed=mismatch is not None)


def errno_of(error: QcowkitError) -> int:
    """The error number that a block device would give."""
    if isinstance(error, StorageError):
        return error.errno
    return errno.ENOTSUP if isinstance(error, UnsupportedFeature) else errno.EIO


def _failed(command: str, text: str, *, code: int) -> Outcome:
    # The one result that qemu-io tells under another name, which scripts compare with.
    shown = "readv" if command == "aio_read" else command
    failure = Failure(command=shown, reason=os.strerror(code))
    return Outcome(reports=(failure,), errors=(f"{command}: {text}",), failed=True)


def _pieces(request: Request) -> Iterator[tuple[int, int]]:
    """(guest offset, length), ascending."""
    start, stop = request.offset, request.offset + request.length
    while start < stop:
        end = min(stop, align_down(start, _PIECE) + _PIECE)
        yield start, end - start
        start = end


# Reading


def _read(target: Target, request: ReadRequest) -> tuple[str | None, bytes | None]:
    """(the first byte that was not expected, the bytes if they are to be printed)."""
    chain = target.chain
    if target.copy_on_read:
        copy_up(chain, start=request.offset, length=request.length)
    buffer = bytearray(min(request.length, _PIECE))
    dump = bytearray()
    wrong = None
    for start, length in _pieces(request):
        view = memoryview(buffer)[:length]
        chain.read_into(view, offset=start)
        if request.verify is not None and wrong is None:
            wrong = _first_wrong(view, request.verify, at=start, origin=request.offset)
        if request.dump:
            dump += view
    return wrong, bytes(dump) if request.dump else None


def _first_wrong(view: memoryview, verify: Verification, *, at: int, origin: int) -> str | None:
    """Where a piece that begins at guest offset `at` differs. origin: where the read began."""
    begin = max(0, origin + verify.start - at)
    end = min(len(view), origin + verify.start + verify.length - at)
    if begin >= end:
        return None
    part = np.frombuffer(view, dtype=np.uint8)[begin:end]
    differs = part != verify.pattern
    if not differs.any():
        return None
    first = int(differs.argmax())
    place = at + begin + first
    return f"byte at offset {place:#x} is {int(part[first]):#04x}, expected {verify.pattern:#04x}"


def copy_up(chain: Chain, *, start: int, length: int) -> None:
    """Copy on read: what the layers below decide of whole clusters is stored in the top image.

    Raises as `Chain.write`."""
    if not length:
        return
    size = chain.cluster_size
    begin, stop = align_down(start, size), min(align_up(start + length, size), chain.size)
    for table in chain.iter_extents(start=begin, length=stop - begin):
        for row in table:
            if row.layer == 0 and row.flags & Flag.PRESENT:
                continue
            for at in range(row.start, row.start + row.length, _PIECE):
                part = min(_PIECE, row.start + row.length - at)
                data = chain.read(offset=at, length=part)
                if data.count(0) == part:
                    chain.write_zeroes(offset=at, length=part)
                else:
                    chain.write(data, offset=at)


# Changing


def _why_not_compressed(chain: Chain, request: WriteRequest) -> tuple[int, str] | None:
    """(error number, reason) where a compressed write cannot be; None where it may try."""
    if not request.compressed:
        return None
    metadata = chain.images[0].metadata
    if not isinstance(metadata, Qcow2Metadata):
        return errno.ENOTSUP, f"{chain.format} images have no compressed clusters"
    if metadata.data_file:
        return errno.ENOTSUP, "compressed clusters cannot lie in a data file"
    size = chain.cluster_size
    end = request.offset + request.length
    if request.offset % size or (end % size and end != chain.size):
        reason = f"[{request.offset:#x}, {end:#x}) is not a range of whole clusters of {size:#x}"
        return errno.EINVAL, reason
    return None


def _write(target: Target, request: WriteRequest) -> None:
    chain, content = target.chain, request.content
    if content is None:
        chain.write_zeroes(
            offset=request.offset,
            length=request.length,
            unmap=request.unmap and target.passes_discards,
            fallback=request.fallback,
        )
    else:
        put = chain.write_compressed if request.compressed else chain.write
        same = memoryview(tile(content, position=0, length=min(request.length, _PIECE)))
        for start, length in _pieces(request):
            if len(content) == 1:
                put(same[:length], offset=start)
            else:
                position = start - request.offset
                put(tile(content, position=position, length=length), offset=start)
    if request.durable or target.writethrough:
        chain.flush()


def _discard(target: Target, request: DiscardRequest) -> None:
    if not target.chain.writable:
        raise RequestError("the image is open read-only")
    if target.passes_discards:
        target.chain.discard(offset=request.offset, length=request.length)
        if target.writethrough:
            target.chain.flush()
