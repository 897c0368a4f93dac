"""The kinds of qcow2 disks that are crashed: every knob of the format, each small enough that its
tables grow within a run. Reliability reference, section 3.4, "Workloads"."""

from __future__ import annotations

from qcowkit.engine.options import OpenOptions
from qcowkit.engine.qcow2.repair import repair_qcow2
from qcowkit.engine.repairs import RepairMode
from qcowkit.testing.crash_disks import DiskKind
from qcowkit.testing.crash_storage import CrashFiles
from qcowkit.testing.crash_workload import USUAL, Plan
from qcowkit.units import KiB, MiB

_SMALL = 512
_EAGER = OpenOptions(discard=True, pass_discard_other=True)
# Caches of the least size: tables are written back in the middle of operations.
_TIGHT = OpenOptions(l2_cache_size=1 * KiB, l2_cache_entry_size=512, refcount_cache_size=2 * KiB)

_LUKS = {"encrypt.format": "luks", "encrypt.cipher-alg": "aes-128", "encrypt.iter-time": 1}

KINDS = {
    kind.name: kind
    for kind in (
        DiskKind(
            name="clusters of 512 bytes",
            size=64 * KiB,
            capacity=192 * KiB,
            options={"cluster_size": _SMALL},
        ),
        DiskKind(
            name="clusters of 1 KiB, backing",
            size=96 * KiB,
            capacity=160 * KiB,
            backing=64 * KiB,
            options={"cluster_size": KiB},
        ),
        DiskKind(
            name="clusters of 4 KiB, backing, discards passed down",
            size=256 * KiB,
            capacity=512 * KiB,
            backing=512 * KiB,
            options={"cluster_size": 4 * KiB},
            open_options=_EAGER,
        ),
        DiskKind(
            name="clusters of 64 KiB",
            size=512 * KiB,
            capacity=MiB,
            options={"cluster_size": 64 * KiB},
            open_options=_EAGER,
        ),
        DiskKind(
            name="clusters of 2 MiB",
            size=4 * MiB,
            capacity=6 * MiB,
            options={"cluster_size": 2 * MiB},
        ),
        *(
            DiskKind(
                name=f"{bits} bits a refcount",
                size=48 * KiB,
                capacity=96 * KiB,
                options={"cluster_size": _SMALL, "refcount_bits": bits},
                open_options=_EAGER if bits in (1, 64) else OpenOptions(),
            )
            for bits in (1, 2, 4, 8, 32, 64)
        ),
        DiskKind(
            name="refcount table grows",
            size=2304 * KiB,
            filled=1968 * KiB,
            options={"cluster_size": _SMALL, "refcount_bits": 64},
        ),
        DiskKind(
            name="subclusters",
            size=192 * KiB,
            capacity=384 * KiB,
            options={"cluster_size": 16 * KiB, "extended_l2": True},
            open_options=_EAGER,
        ),
        DiskKind(
            name="subclusters, backing",
            size=192 * KiB,
            capacity=384 * KiB,
            backing=160 * KiB,
            options={"cluster_size": 16 * KiB, "extended_l2": True},
        ),
        DiskKind(
            name="version 2",
            size=64 * KiB,
            capacity=96 * KiB,
            options={"cluster_size": _SMALL, "compat": "0.10"},
        ),
        DiskKind(
            name="version 2, backing",
            size=64 * KiB,
            capacity=96 * KiB,
            backing=32 * KiB,
            options={"cluster_size": _SMALL, "compat": "0.10"},
        ),
        DiskKind(
            name="lazy refcounts",
            size=128 * KiB,
            capacity=192 * KiB,
            options={"cluster_size": KiB, "lazy_refcounts": True},
        ),
        DiskKind(
            name="lazy refcounts without a record",
            size=64 * KiB,
            capacity=96 * KiB,
            options={"cluster_size": _SMALL, "refcount_bits": 64},
            open_options=OpenOptions(lazy_refcounts=True),
        ),
        DiskKind(
            name="lazy refcounts, refcount table grows",
            size=2304 * KiB,
            filled=1968 * KiB,
            options={"cluster_size": _SMALL, "refcount_bits": 64, "lazy_refcounts": True},
        ),
        DiskKind(
            name="data file",
            size=64 * KiB,
            capacity=96 * KiB,
            data_file=True,
            options={"cluster_size": _SMALL},
            open_options=_EAGER,
        ),
        DiskKind(
            name="data file, backing",
            size=64 * KiB,
            capacity=96 * KiB,
            backing=80 * KiB,
            data_file=True,
            options={"cluster_size": KiB},
        ),
        DiskKind(
            name="raw data file",
            size=64 * KiB,
            capacity=96 * KiB,
            data_file=True,
            options={"cluster_size": _SMALL, "data_file_raw": True},
        ),
        DiskKind(
            name="zstd",
            size=128 * KiB,
            capacity=192 * KiB,
            options={"cluster_size": 4 * KiB, "compression_type": "zstd"},
        ),
        DiskKind(
            name="legacy encryption, backing",
            size=64 * KiB,
            capacity=96 * KiB,
            backing=40 * KiB,
            options={"cluster_size": KiB, "encrypt.format": "aes"},
            secret=b"crash",
        ),
        DiskKind(
            name="luks, backing",
            size=64 * KiB,
            capacity=96 * KiB,
            backing=80 * KiB,
            options={"cluster_size": 4 * KiB, **_LUKS},
            open_options=_EAGER,
            secret=b"crash",
        ),
        DiskKind(
            name="luks, subclusters",
            size=96 * KiB,
            capacity=128 * KiB,
            options={"cluster_size": 16 * KiB, "extended_l2": True, **_LUKS},
            secret=b"crash",
        ),
        DiskKind(
            name="clusters stay with discarded data",
            size=64 * KiB,
            capacity=96 * KiB,
            options={"cluster_size": _SMALL},
            open_options=OpenOptions(discard=True, discard_no_unref=True),
            discard_clears=False,
        ),
        DiskKind(
            name="least caches",
            size=128 * KiB,
            capacity=192 * KiB,
            options={"cluster_size": KiB},
            open_options=_TIGHT,
        ),
    )
}

COMPRESSING = {**USUAL, "write": 20, "write_compressed": 40, "discard": 16}
SPARING = {**USUAL, "flush": 4}
TRIMMING = {**USUAL, "discard": 40, "write_zeroes": 20}
FILLING = {"write": 50, "write_compressed": 10, "flush": 10, "reopen": 2}
RESIZING = {**USUAL, "resize": 30, "discard": 20}
PLANS = (
    Plan(operations=50, weights=FILLING),
    Plan(operations=50),
    Plan(operations=50, weights=COMPRESSING),
    Plan(operations=50, weights=SPARING),
    Plan(operations=50, weights=TRIMMING),
    Plan(operations=40, weights=RESIZING),
)


def repair(files: CrashFiles) -> None:
    """Put right all that can be."""
    repair_qcow2(files.open(), mode=RepairMode.ALL)
