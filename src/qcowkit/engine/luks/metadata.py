"""A LUKS1 disk by itself, as cryptsetup and qemu make it: header and key material, then the disk.

Source: the LUKS1 on-disk format. Numpy-free: no key is needed to say what it is."""

from __future__ import annotations

from dataclasses import dataclass

from qcowkit.budget import Budget
from qcowkit.codecs.qcow2.luks_header import LUKS_HEADER_BYTES, LuksHeader
from qcowkit.errors import CorruptMetadata
from qcowkit.references import Reference
from qcowkit.storage.protocol import Storage
from qcowkit.units import SECTOR, align_down

# Where the payload offset stands: a count of sectors, 32 bits, big-endian.
_PAYLOAD_FIELD = slice(104, 108)


@dataclass(frozen=True, slots=True, kw_only=True)
class LuksMetadata:
    """What a header says, and the guest bytes behind it: whole sectors."""

    header: LuksHeader
    virtual_size: int
    references: tuple[Reference, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def format(self) -> str:
        """The name of the format, as the command line spells it."""
        return "luks"

    @property
    def encrypted(self) -> str:
        """The method, as for qcow2 images."""
        return "luks"


def load_luks_metadata(storage: Storage, *, budget: Budget) -> LuksMetadata:
    """Read and judge the header. Raises CorruptMetadata, UnsupportedFeature for another version
    than 1, BudgetExceeded and StorageError."""
    raw = storage.pread(LUKS_HEADER_BYTES, offset=0)
    payload = int.from_bytes(raw[_PAYLOAD_FIELD], "big") * SECTOR
    header = LuksHeader.decode(raw, host_offset=0, length=payload)
    end = storage.size()
    if end < payload:
        reason = f"the payload begins at {payload:#x}, behind the end of the file at {end:#x}"
        raise CorruptMetadata("LUKS header", host_offset=0, reason=reason)
    size = align_down(end - payload, SECTOR)
    budget.spend("virtual size", value=size, limit=budget.virtual_size)
    rest = end - payload - size
    cut = f"the last {rest} bytes of the file are no whole sector and are cut"
    return LuksMetadata(header=header, virtual_size=size, warnings=(cut,) if rest else ())
