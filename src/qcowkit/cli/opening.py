"""Opening guest disks for the verbs that read them. The one shared module here that needs numpy."""

from __future__ import annotations

from argparse import Namespace

from qcowkit.cli.common import image_specs, make_gate, warn
from qcowkit.cli.options import ImageSpec
from qcowkit.image.chain import Chain
from qcowkit.image.registry import open_chain


def open_disk(
    args: Namespace, name: str, *, format: str | None, snapshot: str | None = None
) -> Chain:
    """The disk of an operand and all it stands on, for reading; warnings go to standard error."""
    (spec,) = image_specs(args, [name], format=format)
    return open_spec(args, spec, snapshot=snapshot)


def open_spec(args: Namespace, spec: ImageSpec, *, snapshot: str | None = None) -> Chain:
    """The same for an operand that was read already."""
    chain = open_chain(
        spec.path,
        format=spec.format,
        gate=make_gate(args),
        snapshot=snapshot,
        options=spec.opening,
    )
    warn(args, chain.warnings)
    return chain
