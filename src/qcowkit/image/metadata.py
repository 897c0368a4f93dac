"""The metadata of one image of any format, loaded through one door. Numpy-free."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from qcowkit.budget import UNTRUSTED, Budget
from qcowkit.engine.luks.metadata import LuksMetadata, load_luks_metadata
from qcowkit.engine.qcow2.metadata import (
    Qcow2Metadata,
    load_qcow2_guid,
    load_qcow2_metadata,
)
from qcowkit.engine.vhd.metadata import VhdMetadata, load_vhd_metadata
from qcowkit.errors import QcowkitError, StorageError, UnknownFormat
from qcowkit.image.probe import probe_format
from qcowkit.references import Reference
from qcowkit.storage.protocol import Storage
from qcowkit.units import SECTOR, align_up

FORMAT_ALIASES = {"vhd": "vpc"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RawMetadata:
    """A raw disk: as long as its file, in whole sectors; what is missing of the last is zeros."""

    virtual_size: int
    references: tuple[Reference, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def format(self) -> str:
        """The name of the format, as the command line spells it."""
        return "raw"


Metadata = Qcow2Metadata | VhdMetadata | LuksMetadata | RawMetadata


def canonical_format(name: str) -> str:
    """`qcow2`, `vpc`, `luks` or `raw` for one of the names people use. Raises UnknownFormat."""
    name = FORMAT_ALIASES.get(name, name)
    if name not in ("qcow2", "vpc", "luks", "raw"):
        raise UnknownFormat(f"format {name!r} is not known, expected qcow2, vpc (vhd), luks or raw")
    return name


def guid_of(metadata: Metadata) -> UUID | None:
    """Which disk an image is, as it says: the GUID of a qcow2 image that has one, the unique id of
    a VHD; None for everything else, and for a capsule, which is not the disk it was made of."""
    if isinstance(metadata, VhdMetadata):
        return metadata.unique_id
    if not isinstance(metadata, Qcow2Metadata) or metadata.header.capsule:
        return None
    return metadata.guid


def load_guid(storage: Storage) -> UUID | None:
    """The same for a file of any content, of which little is read; None for what is no sound image
    of a known format. Raises StorageError."""
    try:
        match probe_format(storage):
            case "qcow2":
                return load_qcow2_guid(storage)
            case "vpc":
                return load_vhd_metadata(storage, budget=UNTRUSTED).unique_id
    except StorageError:
        raise
    except QcowkitError:
        pass
    return None


def load_metadata(storage: Storage, format: str, *, budget: Budget) -> Metadata:
    """Everything that can be known without reading the mapping; see the loader of each format.

    format: a name as `canonical_format` takes it. Raises UnknownFormat, CorruptMetadata,
    UnsupportedFeature, BudgetExceeded and StorageError."""
    match canonical_format(format):
        case "qcow2":
            return load_qcow2_metadata(storage, budget=budget)
        case "vpc":
            return load_vhd_metadata(storage, budget=budget)
        case "luks":
            return load_luks_metadata(storage, budget=budget)
    size = align_up(storage.size(), SECTOR)
    budget.spend("virtual size", value=size, limit=budget.virtual_size)
    return RawMetadata(virtual_size=size)
