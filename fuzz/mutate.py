"""Mutations of an input, from a seeded source of randomness. Pure."""

from __future__ import annotations

import random
from collections.abc import Sequence

from fuzz.images import VALUES

MAX_LENGTH = 1 << 14


def mutate(data: bytes, *, noise: random.Random, others: Sequence[bytes]) -> bytes:
    """A neighbour of `data`: one to four small changes. others: inputs to take pieces from."""
    changed = bytearray(data)
    for _ in range(noise.choice((1, 1, 2, 4))):
        _mutate_once(changed, noise, others)
    return bytes(changed[:MAX_LENGTH])


def _mutate_once(data: bytearray, noise: random.Random, others: Sequence[bytes]) -> None:
    place = noise.randrange(len(data) + 1)
    match noise.randrange(9) if data else 8:
        case 0:
            data[place % len(data)] ^= 1 << noise.randrange(8)
        case 1:
            data[place % len(data)] = noise.randrange(256)
        case 2 | 3:
            _put_number(data, place, noise)
        case 4:
            del data[place:]
        case 5:
            del data[place : place + noise.randrange(1, 17)]
        case 6:
            piece = data[place : place + noise.randrange(1, 33)]
            data[place:place] = piece * noise.randrange(1, 4)
        case 7:
            other = noise.choice(others)
            begin = noise.randrange(len(other) + 1)
            data[place : place + 16] = other[begin : begin + noise.randrange(1, 64)]
        case _:
            data[place:place] = noise.randbytes(noise.randrange(1, 17))


def _put_number(data: bytearray, place: int, noise: random.Random) -> None:
    width = noise.choice((1, 2, 4, 8))
    value = noise.choice(VALUES) & ((1 << 8 * width) - 1)
    begin = place // width * width
    data[begin : begin + width] = value.to_bytes(width, "big")
