"""What people type: -o keys, --image-opts, --object, sizes and the operands of dd."""

from __future__ import annotations

import contextlib

from qcowkit.cli.commands.dd import parse_operands
from qcowkit.cli.create_options import CREATE_OPTIONS, parse_create_options
from qcowkit.cli.options import asks_for_help, parse_image_opts, parse_object, split_options
from qcowkit.errors import QcowkitError
from qcowkit.operations.create import CreateOptions, qcow2_spec
from qcowkit.units import format_size, parse_size


def target(data: bytes) -> None:
    """data: one argument, as the interpreter decodes it."""
    text = data.decode("utf-8", "surrogateescape")
    asks_for_help([text])
    split_options(text)
    with contextlib.suppress(QcowkitError):
        format_size(parse_size(text))
    with contextlib.suppress(QcowkitError):
        parse_image_opts(text)
    with contextlib.suppress(QcowkitError):
        parse_operands(text.split())
    if "file=" not in text:
        # That one would read a file.
        with contextlib.suppress(QcowkitError):
            parse_object(text)
    for format in CREATE_OPTIONS:
        with contextlib.suppress(QcowkitError):
            values = parse_create_options(format, [text])
            if format == "qcow2":
                qcow2_spec(CreateOptions.of(format, values), size=1 << 20)


def seeds() -> list[bytes]:
    """Some of each."""
    return [
        b"cluster_size=64k,refcount_bits=16,extended_l2=on",
        b"compat=v3,preallocation=falloc,data_file=a,,b,data_file_raw=on",
        b"driver=qcow2,file.filename=disk.qcow2",
        b"secret,id=s,data=cGFzcw==,format=base64",
        b"subformat=fixed,force_size=off",
        b"if=a of=b bs=1.5M count=3 skip=0x10",
        b"1.5G",
        b"0x200",
    ]
