"""One switch runs the suite on images of another kind: `pytest --image-options=extended_l2`.

A variant changes the defaults with which qcow2 images are built, created, converted to and
measured, here and by qemu-img, wherever a test leaves them open. What a test says itself wins, and
where that excludes the variant, the variant is left out of that image. A test that is about the
plain defaults is marked `pinned`, and skipped."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import wraps
from types import ModuleType
from typing import Any

from qcowkit.cli.create_options import parse_create_options
from qcowkit.cli.table import VERBS
from qcowkit.engine.qcow2.spec import refuse_compressed_data_file
from qcowkit.errors import QcowkitError
from qcowkit.image import registry
from qcowkit.image.gate import ReferenceGate
from qcowkit.operations import convert, create, measure
from qcowkit.operations.create import CreateOptions, OptionValue, qcow2_spec
from qcowkit.testing import qcow2_builder
from qcowkit.testing.qcow2_builder import BuiltImage, Clusters, Compressed, Data, ImageSpec, Zero
from qcowkit.units import SECTOR


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """built: fields of ImageSpec. created: keys of `-o`; data_file gets a name for each image."""

    name: str
    built: Mapping[str, Any] = field(default_factory=dict)
    created: Mapping[str, OptionValue] = field(default_factory=dict)


_ALL = (
    Variant(
        name="extended_l2",
        built={"extended_l2": True, "cluster_bits": 14},
        created={"extended_l2": True},
    ),
    Variant(name="refcount_bits=1", built={"refcount_order": 0}, created={"refcount_bits": 1}),
    Variant(name="refcount_bits=64", built={"refcount_order": 6}, created={"refcount_bits": 64}),
    Variant(name="compat=0.10", built={"version": 2}, created={"compat": "0.10"}),
    # Whoever builds bytes writes them himself, so there a data file cannot be slipped in.
    Variant(name="data_file", created={"data_file": "{name}-{number}.data"}),
    Variant(
        name="compression_type=zstd",
        built={"compression_type": 1},
        created={"compression_type": "zstd"},
    ),
    Variant(name="cluster_size=512", built={"cluster_bits": 9}, created={"cluster_size": 512}),
)
VARIANTS = {variant.name: variant for variant in _ALL}

_PLAIN = {one.name: one.default for one in fields(ImageSpec) if one.default is not MISSING}
# Modules and names of what makes images.
_DOORS = {
    ("qcowkit.testing.qcow2_builder", "ImageSpec"),
    ("qcowkit.testing.qcow2_builder", "build_qcow2"),
    ("qcowkit.operations.create", "create_image"),
    ("qcowkit.operations.convert", "convert"),
    ("qcowkit.operations.measure", "measure"),
    ("qcowkit.cli.main", "main"),
    ("tests.peers", "run_peer"),
}
# Letters of qemu-img's flags that take a value, by verb.
_VALUED = {"create": "fobF", "convert": "OfFoBlSmtTr", "measure": "Ofol"}


def install(name: str) -> None:
    """Make `name` the variant of this process; before any test module is imported.

    The package has no ambient configuration, so its doors are wrapped from outside: what tests
    import, and what the command line calls. All else is loaded before, and makes what it wants."""
    variant = VARIANTS[name]
    verbs = {verb.name: verb.load() for verb in VERBS}
    ImageSpec.__init__ = _varied_init(variant, ImageSpec.__init__)  # type: ignore[method-assign]
    qcow2_builder.build_qcow2 = _varied_build(qcow2_builder.build_qcow2)
    varied = _varied_create(variant, create.create_image)
    for module in (create, verbs["create"]):
        module.create_image = varied  # type: ignore[union-attr]
    varied = _varied_convert(variant, convert.convert)
    for module in (convert, verbs["convert"], verbs["dd"]):
        module.convert = varied  # type: ignore[union-attr]
    varied = _varied_measure(variant, measure.measure)
    for module in (measure, verbs["measure"]):
        module.measure = varied  # type: ignore[union-attr]
    if "data_file" in variant.created:
        registry.open_chain = _lenient_open(registry.open_chain)


def can_notice(module: ModuleType, seen: frozenset[str] = frozenset()) -> bool:
    """Whether a module of tests, or a helper that it imports from, makes images where a variant
    shows: whether it holds one of the doors."""
    for value in tuple(vars(module).values()):
        place = getattr(value, "__module__", None)
        if (place, getattr(value, "__name__", None)) in _DOORS:
            return True
        if isinstance(place, str) and place.startswith("tests.") and place not in seen:
            helper = sys.modules.get(place)
            if helper is not module and helper is not None:
                seen |= {place}
                if can_notice(helper, seen):
                    return True
    return False


# Built images


def _varied_init(variant: Variant, plain: Callable[..., None]) -> Callable[..., None]:
    @wraps(plain)
    def init(self: ImageSpec, **given: Any) -> None:
        values = {**_PLAIN, "clusters": {}, **variant.built, **given}
        if not can_be_built(values):
            # `replace` names every field, so there what is ours is told by its value.
            said = given if len(given) < len(values) else {}
            ours = {key for key, value in variant.built.items() if values[key] == value}
            values.update({key: _PLAIN[key] for key in ours - said.keys()})
        plain(self, **values)

    return init


def _varied_build(plain: Callable[..., BuiltImage]) -> Callable[..., BuiltImage]:
    @wraps(plain)
    def build_qcow2(spec: ImageSpec | None = None, **changes: Any) -> BuiltImage:
        # Without a spec it is known what was said; and a spec as it stands needs no replacement.
        if spec is None or not changes:
            return qcow2_builder._Builder(spec or ImageSpec(**changes)).build()
        return plain(spec, **changes)

    return build_qcow2


def can_be_built(values: Mapping[str, Any]) -> bool:
    """Whether these fields of ImageSpec can go together."""
    clusters = list(_clusters_of([values["clusters"], *_snapshot_clusters(values["snapshots"])]))
    packed = any(isinstance(one, Compressed) for one in clusters)
    modern = (
        values["extended_l2"]
        or values["refcount_order"] != 4
        or values["compression_type"]
        or values["lazy_refcounts"]
        or values["bitmaps"]
        or values["data_file_name"] is not None
        or values["unknown_fields"]
        or any(isinstance(one, Zero) for one in clusters)
    )
    refused = (
        values["version"] == 2 and modern,
        values["extended_l2"] and values["cluster_bits"] < 14,
        # Compressed bytes come from the test, and are of the plain kind.
        values["compression_type"] and packed,
        # Sharing needs counts above 1.
        values["refcount_order"] == 0 and (packed or values["snapshots"]),
        any(len(_payload(one)) > 1 << values["cluster_bits"] for one in clusters),
    )
    return not any(refused)


def _snapshot_clusters(snapshots: Sequence[Any]) -> list[Clusters]:
    return [one.clusters for one in snapshots if one.clusters is not None]


def _clusters_of(tables: Iterable[Clusters]) -> Iterable[Any]:
    return itertools.chain.from_iterable(table.values() for table in tables)


def _payload(cluster: Any) -> bytes:
    if isinstance(cluster, bytes):
        return cluster
    return (cluster.payload or b"") if isinstance(cluster, Data | Zero | Compressed) else b""


# Created images

_numbers = itertools.count()


def created_with(
    variant: Variant | None,
    values: Mapping[str, OptionValue],
    *,
    path: Any = None,
    size: int | None = None,
    compress: bool = False,
) -> dict[str, OptionValue]:
    """The keys of `-o` with those of the variant, where both can be. size: guest bytes."""
    if variant is None:
        return dict(values)
    added = dict(variant.created)
    if "data_file" in added:
        # qemu looks for a relative name in the working directory, we beside the image.
        place = os.path.abspath(os.fsdecode(path)) if path is not None else "image"
        added["data_file"] = str(added["data_file"]).format(name=place, number=next(_numbers))
    merged = {**added, **values}
    try:
        spec = qcow2_spec(CreateOptions(format="qcow2", values=merged), size=size or SECTOR)
        if compress:
            refuse_compressed_data_file(spec)
    except QcowkitError:
        return dict(values)
    return merged


def _varied_create(variant: Variant, plain: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(plain)
    def create_image(path: Any, options: CreateOptions, **rest: Any) -> Any:
        if options.format == "qcow2":
            values = created_with(variant, options.values, path=path, size=options.size)
            options = replace(options, values=values)
        return plain(path, options, **rest)

    return create_image


def _varied_convert(variant: Variant, plain: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(plain)
    def convert_disks(sources: Any, path: Any, *, options: Any, **rest: Any) -> Any:
        if options.format == "qcow2" and not options.in_place:
            size = sum(source.size for source in sources)
            values = created_with(
                variant, options.create, path=path, size=size, compress=options.compress
            )
            options = replace(options, create=values)
        return plain(sources, path, options=options, **rest)

    return convert_disks


def _varied_measure(variant: Variant, plain: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(plain)
    def measure_disk(source: Any, *, size: Any = None, format: str, options: Any) -> Any:
        if format == "qcow2":
            bound = source.size if source is not None else size
            options = created_with(variant, options, size=bound)
        return plain(source, size=size, format=format, options=options)

    return measure_disk


def _lenient_open(plain: Callable[..., Any]) -> Callable[..., Any]:
    """A disk whose data lie beside it cannot be opened without following that name."""

    @wraps(plain)
    def open_chain(path: Any, *, gate: ReferenceGate | None = None, **rest: Any) -> Any:
        return plain(path, gate=gate or ReferenceGate.below_image(), **rest)

    return open_chain


# Images of qemu-img


def vary_qemu_img(variant: Variant | None, arguments: Sequence[str]) -> list[str]:
    """A command line of qemu-img with the variant's `-o`, where it makes or measures a qcow2."""
    verb = arguments[0]
    if variant is None or verb not in _VALUED:
        return list(arguments)
    flags, operands = _split(arguments[1:], _VALUED[verb])
    given = dict(flags)
    if given.get("-f" if verb == "create" else "-O") != "qcow2" or "-n" in given:
        return list(arguments)
    try:
        values = parse_create_options("qcow2", [value for flag, value in flags if flag == "-o"])
    except QcowkitError:
        return list(arguments)
    path = operands[0 if verb == "create" else -1] if operands else None
    if "-b" in given or "-B" in given:
        values = {**values, "backing_file": "base", "backing_fmt": "raw"}
    varied = created_with(variant, values, path=path, compress="-c" in given)
    added = [f"{key}={_word(value)}" for key, value in varied.items() if key not in values]
    return [verb, *(["-o", ",".join(added)] if added else []), *arguments[1:]]


def _split(words: Sequence[str], valued: str) -> tuple[list[tuple[str, str]], list[str]]:
    """Short flags with their values, and operands; joined flags are told apart."""
    flags: list[tuple[str, str]] = []
    operands: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word.startswith("--"):
            continue
        if not word.startswith("-"):
            operands.append(word)
            continue
        for index, letter in enumerate(word[1:], 1):
            if letter in valued:
                flags.append((f"-{letter}", word[index + 1 :] or rest.pop(0)))
                break
            flags.append((f"-{letter}", ""))
    return flags, operands


def _word(value: OptionValue) -> str:
    return ("on" if value else "off") if isinstance(value, bool) else str(value)
