"""What the C library does with memory that is given back."""

from __future__ import annotations

import numpy as np

from qcowkit.units import MiB

# Above all temporary arrays of a batch, below the largest that the C library takes as a hint.
_KEPT_BYTES = 16 * MiB


def keep_freed_memory() -> None:
    """Once a big block was freed, the C library keeps the memory of smaller ones for the next.

    Otherwise each batch of table work faults its pages in anew, which is half of its time. Costs
    nothing: the block is never touched."""
    np.empty(_KEPT_BYTES, dtype=np.uint8)
