"""Turns codes of 6 bits into numbers and multiplies them, with each kind of instructions.

The numbers are evenly spaced, so a code less `offset` is its level, and no table is read. In memory
a line is 32 words, one for each of half a band's rows in a pair of columns. A word of a low line
holds the low four bits of four codes. A word of a high line holds the other bits of 8 codes. So
codes become words without any instruction that moves them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from mixchat.kernels.cpu.emit import Pointer, Value
from mixchat.kernels.cpu.units import (
    LARGEST_OF_DIGITS,
    ByteUnit,
    Digits,
    Unit,
    UnitSet,
    WordUnit,
    on,
    on_each,
)

LOW_BITS = 4  # of a code, in the low lines
CODES_OF_LOW = 4  # in a word of a low line
_LINE = 64  # bytes


class _Planes(Unit):
    """Joins low and high bits. The high line of `columns` columns follows their low lines."""

    fields: ClassVar[int]  # of bits of a word of levels: one for each level in it

    @property
    def starts(self) -> range:
        """Return the bytes at which vectors start in a line."""
        return range(0, _LINE, 4 * self.lanes)

    def levels(self, codes: Pointer, offset: Value) -> Iterator[list[Value]]:
        """Yield, for each `columns_at_once`, the levels of rows 0 to 15, then of 16 to 31.

        All at once would not fit in registers.
        """
        for first in range(0, self.columns, self.columns_at_once):
            numbers = (first, first + 1)
            yield [
                self.joined(codes, offset + start, code)
                for code in numbers
                for start in self.starts
            ]

    def joined(self, codes: Pointer, offset: Value, first: int) -> Value:
        """Return the levels of code `first` of all words, for bytes with those of `first` + 2."""
        line, code = divmod(first, CODES_OF_LOW)
        low = codes.load(self.words, offset + line * _LINE) >> LOW_BITS * code
        high = codes.load(self.words, offset + self.columns // CODES_OF_LOW * _LINE)
        width = 16 // self.fields  # bits of a level
        levels = low & sum(0xF << width * number for number in range(self.fields))
        return self.with_high_bits(levels, high, first)

    def with_high_bits(self, levels: Value, high: Value, first: int) -> Value:
        """Return levels of low bits with their other bits, of a high line."""
        extra = self.bits - LOW_BITS
        width = 16 // self.fields
        for number in range(self.fields):
            # To just above the low bits, by one shift, whichever way it goes.
            up = LOW_BITS + width * number - extra * (first + 2 * number)
            moved = high << up if up > 0 else high >> -up
            levels = levels | moved & ((2**extra - 1) << LOW_BITS + width * number)
        return levels


class _InWords(_Planes, WordUnit):
    largest_x = LARGEST_OF_DIGITS
    fields = 1


class InBytes(_Planes, ByteUnit):
    """A word of a low line has codes of columns 0 and 2, or 1 and 3. So has x."""

    fields = 2
    x_order = (0, 2, 1, 3)
    decodes = True


class PlaneDigits(Digits, InBytes):
    """Moves the high bits of a vector by one instruction, with VBMI."""

    def with_high_bits(self, levels: Value, high: Value, first: int) -> Value:
        if not self.permutes:
            return super().with_high_bits(levels, high, first)
        # Each byte takes 8 bits of its 64, from any bit on.
        extra = self.bits - LOW_BITS
        starts = [
            16 * word + extra * (first + 2 * byte) - LOW_BITS
            for word in range(4)
            for byte in range(self.fields)
        ]
        control = self.function.constant(self.bytes, [start % 64 for start in starts] * 8)
        name = "llvm.x86.avx512.pmultishift.qb.512"
        moved = self.function.call(name, self.bytes, control, high.bits_as(self.bytes))
        return levels | (moved & ((1 << extra) - 1 << LOW_BITS)).bits_as(self.words)


_MEMBERS = {"bits": 6, "columns": 8, "level_of_one": 32, "offset": 32}
SIX_BITS = UnitSet(
    6,
    on_each(_InWords, **_MEMBERS),
    {
        "avx512": [on("avx512", InBytes, decodes=False, **_MEMBERS)],
        "avx2": [on("avx2", InBytes, **_MEMBERS)],
        "neon": [on("neon", InBytes, needs=("dotprod",), **_MEMBERS)],
    },
    {
        "avx512": [on("avx512", PlaneDigits, needs=("avx512vnni", "avx512vbmi"), **_MEMBERS)],
        "avx2": [on("avx2", PlaneDigits, needs=("avxvnni",), **_MEMBERS)],
    },
)
