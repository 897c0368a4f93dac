"""A LUKS disk by itself: guest offsets are host offsets behind the header, and encrypted."""

from __future__ import annotations

from collections.abc import Sequence

from qcowkit.budget import Budget
from qcowkit.engine.luks.metadata import LuksMetadata
from qcowkit.engine.luks.unlock import require_secret, unlock_luks
from qcowkit.engine.ranges import check_range
from qcowkit.extents.table import Extent, ExtentTable, Flag, Hit, single
from qcowkit.image.plain import read_encrypted
from qcowkit.storage.protocol import Storage


class LuksImage:
    """A file or device whose LUKS header names its keys. `cluster_size` is the host's block size.

    secret: a passphrase. Raises RequestError without one or for a wrong one, and what
    `unlock_luks` raises."""

    def __init__(
        self, metadata: LuksMetadata, storage: Storage, *, secret: bytes | None, budget: Budget
    ) -> None:
        self.metadata = metadata
        self.cluster_size = storage.caps.block_size
        self.data_storage = storage
        self.cipher = unlock_luks(
            metadata.header,
            storage,
            offset=0,
            secret=require_secret(secret, name=storage.name, method="luks"),
            by_guest=True,
            budget=budget,
        )
        self._payload = metadata.header.payload_offset

    @property
    def size(self) -> int:
        """Guest bytes."""
        return self.metadata.virtual_size

    def extents(self, *, start: int, length: int, limit: int | None = None) -> ExtentTable:
        """All of it is data: a hole of the host decrypts to noise. See `Image.extents`."""
        check_range(start=start, length=length, size=self.size)
        flags = Flag.DATA | Flag.PRESENT | Flag.ENCRYPTED
        return single(start, length, flags, host=self._payload + start)

    def lookup(self, offset: int) -> tuple[Hit, int, int]:
        """See `Image.lookup`."""
        return Hit.OTHER, -1, self.size - offset

    def read_runs(self, runs: Sequence[Extent], buffer: memoryview, *, base: int) -> None:
        """See `Image.read_runs`."""
        read_encrypted(self.data_storage, runs, buffer, self.cipher, base=base, cluster_size=1)

    def close(self) -> None:
        """Forget the keys and close the file."""
        self.cipher.wipe()
        self.data_storage.close()
