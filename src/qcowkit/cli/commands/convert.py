"""`qcow convert`: copy one or several disks, one behind the other, into a new image."""

from __future__ import annotations

from argparse import Namespace
from contextlib import ExitStack
from dataclasses import replace

from qcowkit.cli import exits
from qcowkit.cli.common import (
    CACHE_MODES,
    add_access,
    add_cache,
    add_format,
    add_progress,
    add_quiet,
    count_argument,
    image_format,
    image_specs,
    refuse_stream,
    size_argument,
    snapshot_name,
    warn,
)
from qcowkit.cli.create_options import options_help, parse_create_options
from qcowkit.cli.opening import open_spec
from qcowkit.cli.options import asks_for_help, parse_objects
from qcowkit.cli.parsing import Parser
from qcowkit.cli.printing import write_text
from qcowkit.cli.progress import Progress
from qcowkit.cli.secrets import new_secret
from qcowkit.errors import RequestError
from qcowkit.image.chain import Chain
from qcowkit.operations.convert import ConvertOptions, convert
from qcowkit.units import SECTOR, MiB

_MAX_SPARSE = 16 * MiB
_MAX_COROUTINES = 16


def configure(parser: Parser) -> None:
    """Flags of qemu-img convert; --threads, --target-size and JSON progress are ours."""
    parser.add_argument("sources", metavar="SOURCE", nargs="+", help="image, or several")
    parser.add_argument("target", metavar="TARGET", help="image to write")
    _configure_source(parser)
    _configure_target(parser)
    _configure_work(parser)
    add_quiet(parser)
    add_progress(parser)
    add_access(parser)
    parser.examples(
        "qcow convert disk.raw -O qcow2 disk.qcow2",
        "qcow convert -c -O qcow2 -o compression_type=zstd disk.vhd small.qcow2",
        "qcow convert -n -O raw disk.qcow2 /dev/vg/disk",
        "qcow convert -l before-update -O qcow2 disk.qcow2 old.qcow2",
    )


def _configure_source(parser: Parser) -> None:
    add_format(parser, "-f", what="the sources")
    parser.add_argument(
        "-l",
        dest="snapshot",
        metavar="SNAPSHOT",
        type=snapshot_name,
        help="copy an internal snapshot, by id or name, instead of the current disk",
    )
    add_cache(parser, "-T", what="source")
    parser.add_argument(
        "--bitmaps", action="store_true", help="take over the persistent bitmaps, as they are"
    )
    parser.add_argument(
        "--skip-broken-bitmaps",
        dest="skip_broken_bitmaps",
        action="store_true",
        help="with --bitmaps: leave out inconsistent ones, which end the conversion otherwise",
    )
    parser.add_argument(
        "--salvage", action="store_true", help="write zeros where a source cannot be read"
    )
    parser.add_argument(
        "--target-size",
        choices=("own", "current"),
        default="own",
        help="with -l: the snapshot's own disk size (the default), or that of the current disk",
    )


def _configure_target(parser: Parser) -> None:
    parser.add_argument(
        "-O",
        dest="target_format",
        metavar="FMT",
        type=image_format,
        default="raw",
        help="format of TARGET: raw (the default), qcow2, vpc (vhd) or luks",
    )
    parser.add_argument(
        "-o",
        dest="options",
        metavar="OPTIONS",
        action="append",
        default=[],
        help="options of TARGET as key=value,...; -o help lists them",
    )
    parser.add_argument("-c", "--compress", action="store_true", help="compress the clusters")
    parser.add_argument(
        "-B",
        dest="backing",
        metavar="FILE",
        help="copy only what the source holds above its own base: FILE is the new image's base",
    )
    add_format(parser, "-F", dest="backing_format", what="the base image")
    parser.add_argument(
        "-n",
        dest="in_place",
        action="store_true",
        help="TARGET exists: a raw one is written in place, and a failure leaves it half written; "
        "a qcow2 or VHD one is replaced, when complete, by an image with its options",
    )
    parser.add_argument(
        "--target-is-zero",
        action="store_true",
        help="with -n: TARGET reads as zeros already, so zeros need not be written",
    )
    parser.add_argument(
        "--target-image-opts",
        action="store_true",
        help="with -n: TARGET is a description such as driver=qcow2,file.filename=disk.qcow2",
    )
    parser.add_argument(
        "-t",
        dest="cache_target",
        metavar="CACHE",
        choices=CACHE_MODES,
        help="cache mode of TARGET; accepted for scripts: it is always durable at the end",
    )


def _configure_work(parser: Parser) -> None:
    parser.add_argument(
        "-S",
        dest="sparse_size",
        metavar="SIZE",
        type=size_argument,
        help="shortest run of zeros that becomes a hole (4k); 0 allocates everything",
    )
    parser.add_argument(
        "-C",
        dest="copy_range",
        action="store_true",
        help="let the host copy the data where it can (copy_file_range)",
    )
    parser.add_argument(
        "-r", dest="rate", metavar="RATE", type=size_argument, help="at most RATE bytes a second"
    )
    parser.add_argument(
        "--threads",
        metavar="COUNT",
        type=count_argument,
        help="worker threads (as many as cores); the result does not depend on it",
    )
    parser.add_argument(
        "-W",
        dest="out_of_order",
        action="store_true",
        help="accepted for scripts: work is parallel always, and the result the same",
    )
    parser.add_argument(
        "-m",
        dest="coroutines",
        metavar="COUNT",
        type=count_argument,
        help="accepted for scripts (1 to 16): see --threads",
    )


def run(args: Namespace) -> int:
    """Copy the disks; TARGET appears under its name when it is complete."""
    if asks_for_help(args.options):
        write_text(options_help(args.target_format))
        return exits.SUCCESS
    check_flags(args)
    parse_objects(args.objects)
    target, options = _options(args)
    with ExitStack() as stack:
        sources = [
            stack.enter_context(open_spec(args, spec, snapshot=args.snapshot))
            for spec in image_specs(args, args.sources, format=args.format)
        ]
        if args.target_size == "current":
            options = at_current_size(options, sources[0])
        progress = stack.enter_context(Progress.of(args, "convert"))
        done = convert(sources, target, options=options, progress=progress)
    warn(args, map(_salvage_line, done.salvaged))
    names = map(ascii, done.skipped_bitmaps)
    warn(args, (f"bitmap {name} is inconsistent and was left out" for name in names))
    return exits.SUCCESS


def _salvage_line(spot: tuple[int, int, str]) -> str:
    start, length, reason = spot
    return f"guest offset {start:#x}, {length} bytes: could not be read, zeros now: {reason}"


def _options(args: Namespace) -> tuple[str, ConvertOptions]:
    """The path of the target, and all flags as options of the operation."""
    target, format = args.target, args.target_format
    if args.target_image_opts:
        (spec,) = image_specs(Namespace(image_opts=True), [target], format=None)
        target, format = spec.path, spec.format or format
    create = parse_create_options(format, args.options)
    if "compression_level" in create and not args.compress:
        raise RequestError("-o compression_level needs -c")
    return target, ConvertOptions(
        format=format,
        create=create,
        secret=new_secret(args, format, create),
        compress=args.compress,
        backing=args.backing,
        backing_format=args.backing_format,
        in_place=args.in_place,
        target_is_zero=args.target_is_zero,
        sparse_size=args.sparse_size,
        copy_range=args.copy_range,
        salvage=args.salvage,
        bitmaps=args.bitmaps,
        skip_broken_bitmaps=args.skip_broken_bitmaps,
        rate=args.rate,
        threads=args.threads,
    )


def at_current_size(options: ConvertOptions, source: Chain) -> ConvertOptions:
    """Cut or pad a snapshot to the size of the disk as it is now, as qemu-img does."""
    size = source.layers[0].metadata.virtual_size
    return replace(options, length=min(size, source.size), size=size)


def check_flags(args: Namespace) -> None:
    """Refuse flags that exclude or need one another. Raises RequestError that names both."""
    excluded = (
        (args.copy_range and args.compress, "-C", "-c"),
        (args.copy_range and args.sparse_size is not None, "-C", "-S"),
        (args.copy_range and args.salvage, "-C", "--salvage"),
        (args.in_place and args.options, "-n", "-o"),
        (args.in_place and args.backing is not None, "-n", "-B"),
        (args.backing is not None and len(args.sources) > 1, "-B", "several sources"),
        (args.bitmaps and len(args.sources) > 1, "--bitmaps", "several sources"),
        (args.bitmaps and args.snapshot is not None, "--bitmaps", "-l"),
        (args.snapshot is not None and len(args.sources) > 1, "-l", "several sources"),
    )
    for wrong, flag, other in excluded:
        if wrong:
            raise RequestError(f"{flag} excludes {other}")
    needed = (
        (args.target_is_zero and not args.in_place, "--target-is-zero", "-n"),
        (args.target_image_opts and not args.in_place, "--target-image-opts", "-n"),
        (args.backing_format is not None and args.backing is None, "-F", "-B"),
        (args.backing is not None and args.backing_format is None, "-B", "-F"),
        (args.target_size == "current" and args.snapshot is None, "--target-size", "-l"),
        (args.skip_broken_bitmaps and not args.bitmaps, "--skip-broken-bitmaps", "--bitmaps"),
    )
    for wrong, flag, other in needed:
        if wrong:
            raise RequestError(f"{flag} needs {other}")
    if args.backing is not None and args.target_format != "qcow2":
        raise RequestError(f"-B: {args.target_format} images have no base image here, only qcow2")
    refuse_stream(args.target)
    if args.compress and args.target_format != "qcow2":
        raise RequestError(f"-c: {args.target_format} images cannot be compressed, only qcow2")
    if args.coroutines is not None and not 1 <= args.coroutines <= _MAX_COROUTINES:
        raise RequestError(f"-m is {args.coroutines}, expected 1 to {_MAX_COROUTINES}")
    if args.threads == 0:
        raise RequestError("--threads is 0, expected at least 1")
    if args.sparse_size is not None and (
        args.sparse_size % SECTOR or args.sparse_size > _MAX_SPARSE
    ):
        raise RequestError(
            f"-S is {args.sparse_size}, expected a multiple of {SECTOR} up to {_MAX_SPARSE}"
        )
