"""What an image may ask for. Refused before allocation, never after. Floor 0, pure."""

from __future__ import annotations

from dataclasses import dataclass

from qcowkit.errors import BudgetExceeded
from qcowkit.units import INT64_MAX, MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Limits on one chain. Sizes in bytes.

    virtual_size: of any disk. metadata_bytes: of the tables one image keeps in memory.
    depth: layers of a backing chain. table_cache: decoded L2 tables kept by one image.
    key_iterations: of the derivation of keys from one passphrase, over all slots of a header."""

    virtual_size: int = INT64_MAX
    metadata_bytes: int = 256 * MiB
    depth: int = 200
    table_cache: int = 32 * MiB
    # A minute or two of one core; a header made with the usual two seconds has some millions.
    key_iterations: int = 1 << 28

    def spend(self, what: str, *, value: int, limit: int) -> None:
        """Raise BudgetExceeded when `value` is above `limit`."""
        if value > limit:
            raise BudgetExceeded(what, value=value, limit=limit)


TRUSTED = Budget()
# Services and `inspect`: small enough for a hostile upload, large enough for any real image.
UNTRUSTED = Budget(metadata_bytes=48 * MiB, depth=16, table_cache=8 * MiB, key_iterations=1 << 26)
