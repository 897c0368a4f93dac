"""What locks a file is under, as a stranger sees it: no lock of this program's own is asked."""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

FLOCK = struct.Struct("@hhqqi0q")


def held_bytes(path: str | Path) -> list[int]:
    """The bytes of the file that somebody holds, of those that anybody uses."""

    def held(fd: int, byte: int) -> bool:
        request = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
        answer = FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, request))
        return bool(answer[0] != fcntl.F_UNLCK)

    with open(path, "rb") as file:
        return [byte for byte in range(300) if held(file.fileno(), byte)]
