"""Opening guest disks for the verbs. The one shared module here that needs numpy."""

from __future__ import annotations

from argparse import Namespace

from qcowkit.cli.common import image_specs, make_gate, warn
from qcowkit.cli.options import ImageSpec
from qcowkit.cli.secrets import opening_of
from qcowkit.errors import RequestError
from qcowkit.image.chain import Chain
from qcowkit.image.registry import open_chain


def open_disk(
    args: Namespace,
    name: str,
    *,
    format: str | None,
    snapshot: str | None = None,
    writable: bool = False,
) -> Chain:
    """The disk of an operand and all it stands on; warnings go to standard error."""
    (spec,) = image_specs(args, [name], format=format)
    return open_spec(args, spec, snapshot=snapshot, writable=writable)


def open_spec(
    args: Namespace, spec: ImageSpec, *, snapshot: str | None = None, writable: bool = False
) -> Chain:
    """The same for an operand that was read already."""
    if writable and spec.read_only:
        raise RequestError(f"--image-opts: read-only=on, and {spec.path} would be written")
    chain = open_chain(
        spec.path,
        format=spec.format,
        gate=make_gate(args),
        snapshot=snapshot,
        writable=writable,
        options=opening_of(args, spec),
    )
    warn(args, chain.warnings)
    return chain
