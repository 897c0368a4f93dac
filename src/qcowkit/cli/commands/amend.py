"""`qcow amend`: other options for an image that exists."""

from __future__ import annotations

from argparse import Namespace
from typing import Literal, cast

from qcowkit.budget import TRUSTED
from qcowkit.cli import exits
from qcowkit.cli.common import (
    add_cache,
    add_format,
    add_gate,
    add_image_opts,
    add_objects,
    add_progress,
    add_quiet,
    image_specs,
    make_gate,
)
from qcowkit.cli.options import Secret, asks_for_help, parse_bool, parse_objects, parse_options
from qcowkit.cli.parsing import Parser
from qcowkit.cli.printing import write_lines, write_text
from qcowkit.cli.progress import Progress
from qcowkit.cli.secrets import find_secret, opening_of
from qcowkit.engine.qcow2.amend_plan import COMPATS, Amendment
from qcowkit.errors import RequestError
from qcowkit.image.lineage import Layer, close_layers, open_layers
from qcowkit.operations.amend import AmendOptions, amend_image
from qcowkit.operations.identity import NO_GUID, amend_identity, choose_guid
from qcowkit.operations.keyslots import KeyChange, change_keys
from qcowkit.operations.runs import amend_runs, require_room_for_runs
from qcowkit.units import parse_size

PREFIX = "encrypt."
_HELP = """options of amend, for qcow2 images:
  compat=<str>              0.10 or 1.1
  refcount_bits=<num>       1, 2, 4, 8, 16, 32 or 64
  lazy_refcounts=<bool>     put refcounts off while the image is written; needs compat=1.1
  extended_l2=<bool>        32 subclusters in each cluster
  cluster_size=<size>       512 to 2M
  compression_type=<str>    zlib or zstd; compressed clusters are compressed anew
  data_file=<str>           another name of the external data file
  data_file_raw=<bool>      off: the data file need not be a raw disk any more
  size=<size>               a larger disk
  backing_file, backing_fmt only what the image says already: rebase changes them
  contiguous_runs=<bool>    on: record anew what lies in one piece; off: drop the record
  guid=<str>                which disk this is: auto, a GUID, or none; records the backing file's

options of amend, for images encrypted with LUKS:
  encrypt.state=<str>       active adds a passphrase, inactive takes one away
  encrypt.new-secret=<str>  id of the --object secret with the passphrase to add
  encrypt.old-secret=<str>  id of the --object secret whose slots become inactive
  encrypt.keyslot=<num>     the slot, 0 to 7; the first free one when a key is added
  encrypt.iter-time=<num>   milliseconds that trying the new passphrase takes; 2000 when not given
"""
_KEYS = ("state", "new-secret", "old-secret", "keyslot", "iter-time")
_BOOLS = ("lazy_refcounts", "data_file_raw", "extended_l2")
_TEXTS = ("compat", "data_file", "compression_type")
_IMAGE_KEYS = (
    *("refcount_bits", "cluster_size", "size", "backing_file", "backing_fmt"),
    *_BOOLS,
    *_TEXTS,
)


def configure(parser: Parser) -> None:
    """Flags of qemu-img amend."""
    parser.add_argument("file", metavar="FILE", nargs="?", help="image to change")
    parser.add_argument(
        "-o",
        dest="options",
        metavar="OPTIONS",
        action="append",
        default=[],
        help="what shall change as key=value,...; -o help lists the keys",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="overwrite a key slot that is active, or give up the last key and so the content",
    )
    add_format(parser)
    add_cache(parser, "-t", what="target")
    add_quiet(parser)
    add_progress(parser)
    add_objects(parser)
    add_image_opts(parser)
    add_gate(parser)
    parser.examples(
        "qcow amend -o extended_l2=on,cluster_size=128k disk.qcow2",
        "qcow amend -o compat=0.10,refcount_bits=16 disk.qcow2",
        "qcow amend --object secret,id=a,file=pass --object secret,id=b,file=new --image-opts "
        "-o encrypt.state=active,encrypt.new-secret=b "
        "driver=qcow2,encrypt.key-secret=a,file.filename=disk.qcow2",
        "qcow amend -o encrypt.state=inactive,encrypt.keyslot=1 disk.qcow2",
    )


def run(args: Namespace) -> int:
    """Change the image and say what is true now."""
    if asks_for_help(args.options):
        write_text(_HELP)
        return exits.SUCCESS
    if args.file is None:
        raise RequestError("FILE is missing")
    options = parse_options(args.options)
    if not options:
        raise RequestError("-o is missing: it says what shall change (-o help)")
    text = options.pop("guid", None)
    guid = None if text is None else choose_guid(text)
    runs = options.pop("contiguous_runs", None)
    record = None if runs is None else parse_bool(runs, what="-o contiguous_runs")
    wanted = {key: options.pop(key) for key in _IMAGE_KEYS if key in options}
    change = parse_key_change(options, parse_objects(args.objects)) if options else None
    amending = parse_amendment(wanted) if wanted else None
    (spec,) = image_specs(args, [args.file], format=args.format)
    opening = opening_of(args, spec)
    layers = open_layers(
        spec.path,
        format=spec.format,
        gate=make_gate(args),
        budget=TRUSTED,
        writable=True,
        follow_backing=amending is not None and amending.needs_content,
        follow_data=amending is not None and amending.needs_content,
        locking=opening.locking,
    )
    done = []
    try:
        if record:
            # Before anything is written; the rest of what can be refused is refused by the steps.
            _require_room_for_runs(layers[0], amending)
        if change is not None:
            secret = opening.secrets.at(0)
            done.append(change_keys(layers[0], change, secret=secret, force=args.force).render())
        if amending is not None:
            with Progress.of(args, "amend") as progress:
                result = amend_image(
                    layers, amending, budget=TRUSTED, opening=opening, progress=progress
                )
            done.append(result.render())
        if record is not None:
            count = amend_runs(layers[0], on=record)
            done.append(f"contiguous runs: {count}" if record else "contiguous runs: off")
        if text is not None:
            # Last, since it needs what is in the header by then.
            after = amend_identity(layers[0], guid, gate=make_gate(args))
            done.append(f"guid={NO_GUID if after.guid is None else after.guid}")
    finally:
        close_layers(layers)
    if not args.quiet:
        write_lines([f"{spec.path}: {line}" for line in done])
    return exits.SUCCESS


def _require_room_for_runs(top: Layer, amending: AmendOptions | None) -> None:
    """By what the image will be."""
    amendment = Amendment() if amending is None else amending.amendment
    compat = amendment.compat
    require_room_for_runs(
        top,
        version=None if compat is None else COMPATS[compat],
        cluster_size=amendment.cluster_size,
    )


def parse_amendment(values: dict[str, str]) -> AmendOptions:
    """The change of a qcow2 image that the keys ask for. Raises RequestError that names the key."""
    bools = {key: parse_bool(values[key], what=f"-o {key}") for key in _BOOLS if key in values}
    texts = {key: values[key] for key in _TEXTS if key in values}
    return AmendOptions(
        amendment=Amendment(
            lazy_refcounts=bools.get("lazy_refcounts"),
            data_file_raw=bools.get("data_file_raw"),
            extended_l2=bools.get("extended_l2"),
            compat=texts.get("compat"),
            data_file=texts.get("data_file"),
            compression_type=texts.get("compression_type"),
            refcount_bits=_number(values, "refcount_bits"),
            cluster_size=_size(values, "cluster_size"),
        ),
        size=_size(values, "size"),
        backing_file=values.get("backing_file"),
        backing_fmt=values.get("backing_fmt"),
    )


def parse_key_change(options: dict[str, str], secrets: dict[str, Secret]) -> KeyChange:
    """The change of key slots that the keys ask for; the prefix may be left out, as it is for a
    disk of format luks. Raises RequestError that names the key."""
    values: dict[str, str] = {}
    for key, value in options.items():
        name = key.removeprefix(PREFIX)
        if name not in _KEYS:
            raise RequestError(f"-o {key}: not an option that can be amended (see -o help)")
        values[name] = value
    state = values.get("state")
    if state not in ("active", "inactive"):
        found = "missing" if state is None else repr(state)
        raise RequestError(f"-o {PREFIX}state is {found}, expected active or inactive")
    return KeyChange(
        state=cast("Literal['active', 'inactive']", state),
        new_secret=_secret(values, "new-secret", secrets),
        old_secret=_secret(values, "old-secret", secrets),
        slot=_number(values, "keyslot", prefix=PREFIX),
        iter_time=_number(values, "iter-time", prefix=PREFIX),
    )


def _secret(values: dict[str, str], key: str, secrets: dict[str, Secret]) -> bytes | None:
    name = values.get(key)
    return None if name is None else find_secret(secrets, name, what=f"-o {PREFIX}{key}")


def _number(values: dict[str, str], key: str, *, prefix: str = "") -> int | None:
    text = values.get(key)
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal()):
        raise RequestError(f"-o {prefix}{key} is {text!r}, expected a whole number")
    return int(text)


def _size(values: dict[str, str], key: str) -> int | None:
    text = values.get(key)
    if text is None:
        return None
    try:
        return parse_size(text)
    except RequestError as error:
        raise RequestError(f"-o {key}: {error}") from error
