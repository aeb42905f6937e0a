"""Turns codes of 5 and 6 bits into numbers and multiplies them, with each kind of instructions.

The numbers are evenly spaced, so a code less `offset` is its level, and no table is read. In memory
a line is 32 words, one for each of half a band's rows in a pair of columns. A word of a low line
holds the low four bits of four codes. A word of a high line holds the other bits of 16 codes of 5
bits, or of 8 codes of 6 bits. So codes become words without any instruction that moves them.
"""

from __future__ import annotations

from collections.abc import Iterator

from mixchat.kernels.emit import Pointer, Value
from mixchat.kernels.units import Avx2Words, Avx512Words, UnitSet, WordUnit

LOW_BITS = 4  # of a code, in the low lines
CODES_OF_LOW = 4  # in a word of a low line
_LINE = 64  # bytes


class _Planes(WordUnit):
    """Joins low and high bits. The high line of `columns` columns follows their low lines."""

    largest_x, unrolled = 32767, 1

    def levels(self, codes: Pointer, place: Value) -> Iterator[list[Value]]:
        """Yield, for each pair of columns, the levels of rows 0 to 15, then of 16 to 31.

        All at once would not fit in registers.
        """
        starts = range(0, _LINE, 4 * self.lanes)  # of vectors, which are a line or half a line
        for first in range(0, self.columns, 2):
            lines = (first, first + 1)
            yield [self._joined(codes, place + at, line) for line in lines for at in starts]

    def _joined(self, codes: Pointer, place: Value, line: int) -> Value:
        """Return the codes whose low bits are `line` % 4 in the words of a low line."""
        extra = self.bits - LOW_BITS
        first, at = divmod(line, CODES_OF_LOW)
        low = codes.load(self._words, place + first * _LINE) >> LOW_BITS * at
        high = codes.load(self._words, place + self.columns // CODES_OF_LOW * _LINE)
        up = LOW_BITS - extra * line  # to the place above the low bits
        moved = high << up if up > 0 else high >> -up
        joined: Value = low & 0xF | moved & (2**extra - 1 << LOW_BITS)
        return joined


class _SixBits(_Planes):
    bits, columns, one, offset = 6, 8, 32, 32


class _FiveBits(_Planes):
    bits, columns, one, offset = 5, 16, 16, 16


class Avx512SixBits(_SixBits, Avx512Words):
    """6-bit codes with AVX-512."""

    _widths = (8, 4, 3, 2, 1)


class Avx2SixBits(_SixBits, Avx2Words):
    """6-bit codes with AVX2."""

    _widths = (2, 1)


class Avx512FiveBits(_FiveBits, Avx512Words):
    """5-bit codes with AVX-512."""

    _widths = (8, 4, 3, 2, 1)


class Avx2FiveBits(_FiveBits, Avx2Words):
    """5-bit codes with AVX2."""

    _widths = (2, 1)


FIVE_BITS = UnitSet(5, words={"avx512": Avx512FiveBits, "avx2": Avx2FiveBits}, bytes={})
SIX_BITS = UnitSet(6, words={"avx512": Avx512SixBits, "avx2": Avx2SixBits}, bytes={})
