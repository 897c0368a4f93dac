"""The record of contiguous runs of an image that exists: found anew, or taken away."""

from __future__ import annotations

from qcowkit.codecs.qcow2.runs import check_runs_fit
from qcowkit.engine.barriers import Barriers
from qcowkit.engine.qcow2.metadata import Qcow2Metadata, load_qcow2_metadata
from qcowkit.engine.qcow2.runs import record_runs
from qcowkit.errors import UnsupportedFeature
from qcowkit.image.lineage import Layer
from qcowkit.operations.amend import prepare_for_change


def require_room_for_runs(
    layer: Layer, *, version: int | None = None, cluster_size: int | None = None
) -> None:
    """Raise RequestError for an image that cannot have a record, UnsupportedFeature for other
    formats. version, cluster_size: what the image will have, None for what it has."""
    metadata = _metadata(layer)
    check_runs_fit(
        version=version or metadata.header.version,
        cluster_size=cluster_size or metadata.cluster_size,
    )


def amend_runs(layer: Layer, *, on: bool, barriers: Barriers | None = None) -> int:
    """Find the runs of the disk and record them, or take the record away; how many there are.

    layer: open for writing; what is in its header by now counts. Raises as `prepare_for_change`
    and `record_runs`."""
    _metadata(layer)
    barriers = barriers or Barriers(layer.storage)
    prepare_for_change(layer, barriers)
    metadata = load_qcow2_metadata(layer.storage)
    found = record_runs(layer.storage, metadata, on=on, barriers=barriers).extensions.runs
    return 0 if found is None else len(found.runs)


def renew_runs(layer: Layer, *, barriers: Barriers) -> None:
    """Find them anew in an image that has a record, whether or not it still holds."""
    metadata = load_qcow2_metadata(layer.storage)
    if metadata.extensions.runs is not None:
        record_runs(layer.storage, metadata, on=True, barriers=barriers)


def _metadata(layer: Layer) -> Qcow2Metadata:
    if not isinstance(layer.metadata, Qcow2Metadata):
        raise UnsupportedFeature(
            "contiguous runs", reason=f"{layer.metadata.format} images have none, qcow2 images do"
        )
    return layer.metadata
