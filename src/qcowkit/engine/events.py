"""The names of barriers and of metadata steps, said once. Numpy-free.

Fault and crash tests, and the `break` command of `qcow io`, name what is about to happen. A barrier
is a flush that orders writes; leaving any out must be noticed by a test."""

from __future__ import annotations

# Of a qcow2 image, in the order of docs/adr/0011, then those of single operations.
QCOW2_BARRIERS = (
    "autoclear bits before the first change",
    "dirty bit before unaccounted clusters",
    "data and refcounts before tables",
    "refcount table before mapping",
    "refcount table switch before mapping",
    "data before tables",
    "L1 table before its switch",
    "mapping before releasing clusters",
    "flush",
    "refcounts before the dirty bit is cleared",
    "dirty bit cleared",
    "tables before the new size",
    "new size",
    "tables before the smaller size",
    "smaller size",
    "refcount table before its blocks go",
    "cut of the file",
)

# Of opening an image that was left dirty, by its record of dirty L2 tables; docs/adr/0013.
QCOW2_RECOVERY_BARRIERS = (
    "recovery: refcounts written",
    "recovery: refcount table written",
    "recovery: refcount table switched",
)

# Of bitmaps that record what changes; docs/adr/0017.
QCOW2_BITMAP_BARRIERS = ("bitmaps in use before the first change",)

# Of a change of all metadata by one switch (docs/adr/0014).
QCOW2_REFORM_BARRIERS = (
    "new metadata before their switch",
    "switch of metadata",
)

# Of a change of the first cluster (docs/adr/0016).
QCOW2_FIRST_CLUSTER_BARRIERS = (
    "what the first cluster will name",
    "copy of the first cluster before it is read",
    "detour to the copy of the first cluster",
    "rest of the first cluster before its switch",
    "switch of the first cluster",
)

# Metadata steps of a qcow2 image. The names are those that qemu's debugging driver uses for the
# same moments, as far as it has them.
QCOW2_STEPS = (
    "cluster_alloc",
    "cluster_alloc_bytes",
    "cluster_free",
    "cow_read",
    "cow_write",
    "flush_to_disk",
    "l1_grow_activate_table",
    "l1_grow_alloc_table",
    "l1_grow_write_table",
    "l1_update",
    "l2_alloc_allocate",
    "l2_alloc_cow_read",
    "l2_alloc_write",
    "l2_update",
    "refblock_update",
    "reftable_update",
    "write_compressed",
)

# Of a VHD with blocks, then of a fixed one; docs/formats/vhd.md, "Order of writes".
VHD_BARRIERS = (
    "one footer before the other",
    "footer before blocks",
    "blocks before what leads to them",
    "bitmaps and table before more changes",
    "leading footer before the trailing one",
    "footer before the file is cut",
    "table before its header",
    "added space before the size",
    "footer before what relies on it",
    "flush",
)
