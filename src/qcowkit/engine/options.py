"""How an image is opened: the options of qemu's block layer under their own names. Numpy-free.

Source: qemu's documentation of the qcow2 driver ("qcow2 caches", "overlap checks"). Names
are those of the command line, underscores for dashes: `l2-cache-size` is `l2_cache_size`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Locking = Literal["auto", "on", "off"]
OverlapTemplate = Literal["none", "constant", "cached", "all"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Secrets:
    """The passphrases of encrypted layers of a chain.

    by_depth: of single layers, 0 is the top. other: of every other layer that needs one."""

    by_depth: Mapping[int, bytes] = field(default_factory=dict, repr=False)
    other: bytes | None = field(default=None, repr=False)

    @classmethod
    def of(cls, given: Secrets | bytes | Mapping[int, bytes] | None) -> Secrets:
        """From what callers write: one passphrase for all layers, or one for each depth."""
        if isinstance(given, Secrets):
            return given
        if given is None or isinstance(given, bytes):
            return cls(other=given)
        return cls(by_depth=dict(given))

    def at(self, depth: int) -> bytes | None:
        """The passphrase of a layer, None where none was given."""
        return self.by_depth.get(depth, self.other)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenOptions:
    """Sizes in bytes, None for the documented default.

    cache_size: of all caches together. l2_cache_size: a maximum. cache_clean_interval: seconds
    after which unused entries are dropped, 0 for never. lazy_refcounts: None takes what the header
    says. discard: whether guest discards are passed down to the file. pass_discard_*: the same by
    cause; None for requests follows `discard`. overlap_check: a template; `overlap_checks` switches
    single ones, by their names. locking: `off` takes no locks. force_share: read while others
    write. secrets: the passphrases of encrypted layers."""

    cache_size: int | None = None
    l2_cache_size: int | None = None
    l2_cache_entry_size: int | None = None
    refcount_cache_size: int | None = None
    cache_clean_interval: int = 600
    lazy_refcounts: bool | None = None
    discard: bool = False
    pass_discard_request: bool | None = None
    pass_discard_snapshot: bool = True
    pass_discard_other: bool = False
    discard_no_unref: bool = False
    overlap_check: OverlapTemplate = "cached"
    overlap_checks: Mapping[str, bool] = field(default_factory=dict)
    locking: Locking = "auto"
    force_share: bool = False
    secrets: Secrets = field(default_factory=Secrets)


DEFAULT_OPTIONS = OpenOptions()
