"""Effects, the smallest things that a power cut may keep or lose, and what they change.

A file is pages of 4 KiB in a dict; pages are immutable and shared between all states of a run, so
a state costs a copy of a dict."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from qcowkit.units import SECTOR, KiB, align_down, ceil_div

PAGE = 4 * KiB
_ZEROS = bytes(PAGE)


class Content:
    """The bytes of one file. `pages`: by number, what is missing is zeros; `size`: bytes.

    Bytes may lie beyond `size` while effects are replayed; `trim` drops them."""

    __slots__ = ("pages", "size")

    def __init__(self, pages: dict[int, bytes] | None = None, size: int = 0) -> None:
        """Take over the dict."""
        self.pages = {} if pages is None else pages
        self.size = size

    @classmethod
    def of(cls, data: bytes) -> Content:
        """A file that holds `data`."""
        content = cls(size=len(data))
        content.write(data, offset=0)
        return content

    def copy(self) -> Content:
        """Another content, of the same pages."""
        return Content(self.pages.copy(), self.size)

    def to_bytes(self) -> bytes:
        """The whole file."""
        buffer = bytearray(self.size)
        self.read_into(memoryview(buffer), offset=0)
        return bytes(buffer)

    def key(self) -> int:
        """Equal for equal contents; pages of zeros are never kept, so there is one form only."""
        return hash((self.size, frozenset(self.pages.items())))

    def read_into(self, view: memoryview, *, offset: int) -> None:
        """Fill the view, which lies within the file."""
        stop = offset + len(view)
        view[:] = bytes(len(view))
        for number in self.numbers(offset, stop):
            begin = number * PAGE
            first, last = max(begin, offset), min(begin + PAGE, stop)
            view[first - offset : last - offset] = self.pages[number][first - begin : last - begin]

    def numbers(self, start: int, stop: int) -> list[int]:
        """Pages that are there and overlap [start, stop), ascending."""
        first, last = start // PAGE, ceil_div(stop, PAGE)
        if last - first <= len(self.pages):
            return [number for number in range(first, last) if number in self.pages]
        return sorted(number for number in self.pages if first <= number < last)

    def write(self, data: bytes, *, offset: int) -> None:
        """Put bytes, also beyond the size, which stays."""
        position = 0
        while position < len(data):
            number, skip = divmod(offset + position, PAGE)
            count = min(PAGE - skip, len(data) - position)
            page = data[position : position + count]
            if count < PAGE:
                old = self.pages.get(number, _ZEROS)
                page = old[:skip] + page + old[skip + count :]
            self._put(number, page)
            position += count

    def clear(self, *, offset: int, length: int) -> None:
        """Put zeros, also beyond the size, which stays."""
        stop = offset + length
        for number in self.numbers(offset, stop):
            begin = number * PAGE
            first, last = max(begin, offset) - begin, min(begin + PAGE, stop) - begin
            page = self.pages[number]
            self._put(number, page[:first] + bytes(last - first) + page[last:])

    def _put(self, number: int, page: bytes) -> None:
        if page == _ZEROS:
            self.pages.pop(number, None)
        else:
            self.pages[number] = page

    def trim(self) -> None:
        """Forget what lies beyond the size."""
        stop = (max(self.pages, default=-1) + 1) * PAGE
        if stop > self.size:
            self.clear(offset=self.size, length=stop - self.size)


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteEffect:
    """The data of a write. sequence: its place in time. file: index of the file."""

    sequence: int
    file: int
    offset: int
    data: bytes

    @property
    def length(self) -> int:
        """Bytes."""
        return len(self.data)

    def apply(self, content: Content) -> None:
        """Change the content; its size stays."""
        content.write(self.data, offset=self.offset)

    def torn(self, start: int, stop: int) -> WriteEffect:
        """The part of it that lies in the host range [start, stop)."""
        first, last = max(start, self.offset), min(stop, self.offset + len(self.data))
        part = self.data[first - self.offset : last - self.offset]
        return WriteEffect(sequence=self.sequence, file=self.file, offset=first, data=part)


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroEffect:
    """Zeros in place of what was there: written, or a hole."""

    sequence: int
    file: int
    offset: int
    length: int

    def apply(self, content: Content) -> None:
        """Change the content; its size stays."""
        content.clear(offset=self.offset, length=self.length)

    def torn(self, start: int, stop: int) -> ZeroEffect:
        """The part of it that lies in the host range [start, stop)."""
        first, last = max(start, self.offset), min(stop, self.offset + self.length)
        return ZeroEffect(sequence=self.sequence, file=self.file, offset=first, length=last - first)


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeEffect:
    """A new size of the file. cut: it became shorter, and what was behind is gone."""

    sequence: int
    file: int
    size: int
    cut: bool

    def apply(self, content: Content) -> None:
        """Change the size, and drop what a cut drops."""
        content.size = self.size
        if self.cut:
            content.trim()


DataEffect = WriteEffect | ZeroEffect
Effect = DataEffect | SizeEffect


def tear(effect: DataEffect, sectors: Iterable[int]) -> list[DataEffect]:
    """The effect reduced to some of the 512-byte host sectors that it touches, by their index
    among them."""
    base = align_down(effect.offset, SECTOR)
    pieces = (effect.torn(base + index * SECTOR, base + (index + 1) * SECTOR) for index in sectors)
    return [piece for piece in pieces if piece.length]


def count_sectors(effect: DataEffect) -> int:
    """How many host sectors it touches."""
    end = effect.offset + effect.length
    return ceil_div(end, SECTOR) - effect.offset // SECTOR


def replay(base: Content, effects: Iterable[Effect]) -> Content:
    """The content after some effects, in the order given."""
    content = base.copy()
    for effect in effects:
        effect.apply(content)
    content.trim()
    return content
