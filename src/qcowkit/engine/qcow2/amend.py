"""The options of a qcow2 image changed in place: what is refused, and the steps of the rest.

Each step is wholly there after a crash or not at all, and leaves a sound image with the same disk:
an interrupted amendment can be begun again. Order: whatever needs version 3 comes after the upgrade
and before the downgrade. Source: qemu's amend, which cannot change the geometry."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from qcowkit.codecs.qcow2.dirty_tables import plan_dirty_tables
from qcowkit.codecs.qcow2.extensions import encode_first_cluster
from qcowkit.codecs.qcow2.header import (
    V2_HEADER_LENGTH,
    V3_HEADER_LENGTH,
    Header,
)
from qcowkit.codecs.qcow2.snapshots import encode_snapshots
from qcowkit.engine.barriers import Barriers
from qcowkit.engine.executor import ProgressReport
from qcowkit.engine.findings import Effort
from qcowkit.engine.qcow2.amend_plan import (
    Amendment,
    describe,
    plan_header,
    wanted_version,
    with_places,
    without_version_3,
)
from qcowkit.engine.qcow2.cutover import Cutover
from qcowkit.engine.qcow2.first_cluster import rewrite_first_cluster
from qcowkit.engine.qcow2.metadata import Qcow2Metadata, load_qcow2_metadata
from qcowkit.engine.qcow2.reform import Change, Reform, Tree
from qcowkit.engine.qcow2.renewed_data import GuestReader
from qcowkit.engine.qcow2.transform import Transform, fits_as_it_is
from qcowkit.errors import RequestError
from qcowkit.storage.protocol import Storage
from qcowkit.units import SECTOR

# A conversion walks over everything several times.
_FACTOR = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Amender:
    """Carries amendments out on an image that is sound, recovered and closed to everybody else.

    data: where guest clusters lie, `storage` itself mostly. barriers: of both. make_reader: how the
    guest sees the image by these metadata."""

    storage: Storage
    data: Storage
    barriers: Barriers
    make_reader: Callable[[Qcow2Metadata], GuestReader]
    progress: ProgressReport | None = None

    def run(self, amendment: Amendment, *, resize: Callable[[], None] | None = None) -> list[str]:
        """What was changed, as `key=value`. resize: changes the size at its place in the order.

        Raises RequestError before anything is written; CorruptMetadata, OperationError and
        StorageError, after which the image is as some of the steps have left it."""
        metadata = load_qcow2_metadata(self.storage)
        plan_header(metadata, amendment)
        version, done = wanted_version(metadata, amendment), list[str]()
        if metadata.header.version < version:
            metadata = self._upgrade(metadata)
            done.append("compat=1.1")
        done += self._change(metadata, amendment, downgrades=version < metadata.header.version)
        if resize is not None:
            resize()
        metadata = load_qcow2_metadata(self.storage)
        if metadata.header.version > version:
            self._downgrade(metadata)
            done.append("compat=0.10")
        return done

    def _change(
        self, metadata: Qcow2Metadata, amendment: Amendment, *, downgrades: bool
    ) -> list[str]:
        """Everything but version and size."""
        target = plan_header(metadata, amendment)
        if target.compression_type and metadata.header.header_length < V3_HEADER_LENGTH:
            # The field is not there yet.
            metadata = rewrite_first_cluster(
                self.storage, metadata, barriers=self.barriers, header=metadata.header
            )
            target = plan_header(metadata, amendment)
        if downgrades:
            target = without_version_3(target)
        done = describe(metadata, target)
        metadata = self._change_tables(metadata, target, amendment, downgrades=downgrades)
        if metadata.header != with_places(target, metadata.header):
            self._switch(metadata, with_places(target, metadata.header))
        if "lazy_refcounts=on" in done:
            self._add_record()
        if amendment.data_file not in (None, metadata.extensions.data_file):
            metadata = load_qcow2_metadata(self.storage)
            extensions = replace(metadata.extensions, data_file=amendment.data_file)
            rewrite_first_cluster(
                self.storage, metadata, barriers=self.barriers, extensions=extensions
            )
            done.append(f"data_file={amendment.data_file}")
        return done

    def _switch(self, metadata: Qcow2Metadata, header: Header) -> None:
        """Feature bits alone."""
        with Cutover(self.storage, metadata.header, barriers=self.barriers) as cutover:
            cutover.switch(header)

    def _add_record(self) -> None:
        """A record of dirty tables, as new images have it, where there is room for one."""
        metadata = load_qcow2_metadata(self.storage)
        header, extensions = metadata.header, metadata.extensions
        record = plan_dirty_tables(
            cluster_size=header.cluster_size, l1_entries=max(1, header.l1_size)
        )
        if record is None or extensions.dirty_tables is not None:
            return
        with contextlib.suppress(RequestError):
            # Without room for it the image does without, as a new one would.
            rewrite_first_cluster(
                self.storage,
                metadata,
                barriers=self.barriers,
                extensions=replace(extensions, dirty_tables=record),
            )

    def _effort(self) -> Effort:
        return Effort(stored=self.storage.allocated(), factor=_FACTOR, progress=self.progress)

    # Tables and refcounts

    def _change_tables(
        self,
        metadata: Qcow2Metadata,
        target: Header,
        amendment: Amendment,
        *,
        downgrades: bool,
    ) -> Qcow2Metadata:
        old, new = metadata.header, target
        moves = (old.cluster_bits, old.geometry.extended_l2) != (
            new.cluster_bits,
            new.geometry.extended_l2,
        )
        if new.cluster_bits != old.cluster_bits:
            self._check_first_cluster(metadata, target)
        if moves or new.compression_type != old.compression_type or downgrades:
            transform = Transform(
                self.storage,
                metadata,
                target,
                data=self.data,
                read=self.make_reader(metadata),
                barriers=self.barriers,
                effort=self._effort(),
                zero_clusters=not downgrades and old.version >= 3,
            )
            zeros, packed = transform.find_kinds()
            repacks = packed and new.compression_type != old.compression_type
            if repacks and amendment.compression_type is None:
                raise RequestError(
                    "compat=0.10 excludes compression_type=zstd, and the image has such clusters: "
                    "amend compression_type=zlib too"
                )
            if moves or repacks or (downgrades and zeros):
                transform.run()
                return load_qcow2_metadata(self.storage)
        if new.refcount_order != old.refcount_order:
            self._reform(metadata, target)
            return load_qcow2_metadata(self.storage)
        return metadata

    def _reform(self, metadata: Qcow2Metadata, target: Header) -> None:
        """Snapshot table and refcounts anew; everything else stays where it is."""
        reform = Reform(self.storage, metadata, barriers=self.barriers, effort=self._effort())
        reform.run(
            Change(
                active=Tree(tables=np.zeros(0, dtype=np.int64)),
                size=metadata.header.size,
                snapshots=metadata.snapshots,
                in_place=True,
                target=target,
            )
        )
        size = metadata.cluster_size
        for first, count in reform.freed:
            self.storage.discard(offset=first * size, length=count * size)

    def _check_first_cluster(self, metadata: Qcow2Metadata, target: Header) -> None:
        """Whether a first cluster of the new size can say what the old one does."""
        size = target.cluster_size
        if fits_as_it_is(self.storage, metadata, size=size):
            return
        try:
            raw = encode_first_cluster(target, metadata.extensions, metadata.backing_name)
        except RequestError:
            raw = bytes(SECTOR) + b"more"
        # What is written anew has to switch with the header, by its sector.
        if any(raw[SECTOR:]):
            raise RequestError(
                f"the header with its extensions and names has no room in clusters of {size} bytes"
            )

    # Versions

    def _upgrade(self, metadata: Qcow2Metadata) -> Qcow2Metadata:
        """Version 3 wants more of a snapshot than version 2 may have written."""
        table = encode_snapshots(metadata.snapshots)
        raw = self.storage.pread(
            metadata.snapshot_table_bytes, offset=metadata.header.snapshots_offset
        )
        if table != raw.ljust(len(table), b"\0"):
            self._reform(metadata, metadata.header)
            metadata = load_qcow2_metadata(self.storage)
        header = replace(
            metadata.header,
            version=3,
            header_length=V3_HEADER_LENGTH,
            unknown=bytes(7),
        )
        return rewrite_first_cluster(self.storage, metadata, barriers=self.barriers, header=header)

    def _downgrade(self, metadata: Qcow2Metadata) -> None:
        header = replace(
            without_version_3(metadata.header),
            version=2,
            header_length=V2_HEADER_LENGTH,
            unknown=b"",
        )
        extensions = replace(metadata.extensions, bitmaps=None, dirty_tables=None, runs=None)
        rewrite_first_cluster(
            self.storage, metadata, barriers=self.barriers, header=header, extensions=extensions
        )
