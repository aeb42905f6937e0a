"""Turns codes of 5 and 6 bits into numbers and multiplies them, with each kind of instructions.

The numbers are evenly spaced, so a code less `offset` is its level, and no table is read. In memory
a line is 32 words, one for each of half a band's rows in a pair of columns. A word of a low line
holds the low four bits of four codes. A word of a high line holds the other bits of 16 codes of 5
bits, or of 8 codes of 6 bits. So codes become words without any instruction that moves them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from mixchat.kernels.emit import Pointer, Value, i16, vector
from mixchat.kernels.units import (
    Avx2DotBytes,
    Avx2Words,
    Avx512DotBytes,
    Avx512Words,
    ByteUnit,
    Unit,
    UnitSet,
    WordUnit,
)

LOW_BITS = 4  # of a code, in the low lines
CODES_OF_LOW = 4  # in a word of a low line
_LINE = 64  # bytes


class _Planes(Unit):
    """Joins low and high bits. The high line of `columns` columns follows their low lines."""

    unrolled = 1
    fields: ClassVar[int]  # of bits of a word of levels: one for each level in it

    @classmethod
    def widths(cls) -> tuple[int, ...]:
        return (8, 4, 3, 2, 1) if cls.lanes == 16 else (2, 1)

    @property
    def words(self) -> Any:
        """Return the type of a vector of words, which is a line or half a line."""
        return vector(i16, 2 * self.lanes)

    @property
    def starts(self) -> range:
        """Return the bytes at which vectors start in a line."""
        return range(0, _LINE, 4 * self.lanes)

    def joined(self, codes: Pointer, place: Value, first: int) -> Value:
        """Return levels in words, each code `first` of a word, and with bytes the second next."""
        extra = self.bits - LOW_BITS
        line, at = divmod(first, CODES_OF_LOW)
        low = codes.load(self.words, place + line * _LINE) >> LOW_BITS * at
        high = codes.load(self.words, place + self.columns // CODES_OF_LOW * _LINE)
        width = 16 // self.fields  # bits of a level
        levels = low & sum(0xF << width * number for number in range(self.fields))
        for number in range(self.fields):
            # To the place above the low bits.
            up = LOW_BITS + width * number - extra * (first + 2 * number)
            moved = high << up if up > 0 else high >> -up
            levels = levels | moved & ((2**extra - 1) << LOW_BITS + width * number)
        return levels


class _PlaneWords(_Planes, WordUnit):
    largest_x, fields = 32767, 1

    def levels(self, codes: Pointer, place: Value) -> Iterator[list[Value]]:
        """Yield, for each pair of columns, the levels of rows 0 to 15, then of 16 to 31.

        All at once would not fit in registers.
        """
        for first in range(0, self.columns, 2):
            numbers = (first, first + 1)
            yield [self.joined(codes, place + at, code) for code in numbers for at in self.starts]


class _PlaneBytes(_Planes, ByteUnit):
    """A word of a low line has codes of columns 0 and 2, or 1 and 3. So has x."""

    fields, x_order = 2, (0, 2, 1, 3)

    def levels(self, codes: Pointer, place: Value) -> Iterator[list[Value]]:
        """Yield, for each four columns, the levels of rows 0 to 15, then of 16 to 31."""
        for first in range(0, self.columns, CODES_OF_LOW):
            numbers = (first, first + 1)
            yield [self.joined(codes, place + at, code) for code in numbers for at in self.starts]


class _SixBits(_Planes):
    bits, columns, one, offset = 6, 8, 32, 32


class _FiveBits(_Planes):
    bits, columns, one, offset = 5, 16, 16, 16


class Avx512SixBits(_SixBits, _PlaneWords, Avx512Words):
    """6-bit codes with AVX-512."""


class Avx2SixBits(_SixBits, _PlaneWords, Avx2Words):
    """6-bit codes with AVX2."""


class Avx512FiveBits(_FiveBits, _PlaneWords, Avx512Words):
    """5-bit codes with AVX-512."""


class Avx2FiveBits(_FiveBits, _PlaneWords, Avx2Words):
    """5-bit codes with AVX2."""


class Avx512SixBitsBytes(_SixBits, _PlaneBytes, Avx512DotBytes):
    """6-bit codes with AVX-512, x in 8 bits."""


class Avx2SixBitsBytes(_SixBits, _PlaneBytes, Avx2DotBytes):
    """6-bit codes with AVX2, x in 8 bits."""


class Avx512FiveBitsBytes(_FiveBits, _PlaneBytes, Avx512DotBytes):
    """5-bit codes with AVX-512, x in 8 bits."""


class Avx2FiveBitsBytes(_FiveBits, _PlaneBytes, Avx2DotBytes):
    """5-bit codes with AVX2, x in 8 bits."""


FIVE_BITS = UnitSet(
    5,
    words={"avx512": Avx512FiveBits, "avx2": Avx2FiveBits},
    bytes={"avx512": Avx512FiveBitsBytes, "avx2": Avx2FiveBitsBytes},
)
SIX_BITS = UnitSet(
    6,
    words={"avx512": Avx512SixBits, "avx2": Avx2SixBits},
    bytes={"avx512": Avx512SixBitsBytes, "avx2": Avx2SixBitsBytes},
)
