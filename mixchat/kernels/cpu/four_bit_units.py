"""Turns codes of 4 bits into numbers by a table, and multiplies them, with each kind of CPU.

A line is 32 bytes for a pair of columns, with two codes in a byte. Rows 0 to 15 have the low bits,
rows 16 to 31 the high bits. Levels in bytes are unsigned on x86, so 128 is added to each.
"""

from __future__ import annotations

from typing import Any, ClassVar

from mixchat.kernels.cpu.compile import InstructionSet
from mixchat.kernels.cpu.emit import Function, Pointer, Value, f32, i8, i16, vector
from mixchat.kernels.cpu.units import (
    BYTES_AT,
    LARGEST_OF_DIGITS,
    SHORT_BYTES_AT,
    ByteUnit,
    Digits,
    Unit,
    UnitSet,
    WordUnit,
    on,
)

LINE = 32  # bytes
_BY_TURNS = [at + 16 * odd for at in range(16) for odd in (0, 1)]  # words of two lines


class Avx512FourBits(WordUnit):
    """4-bit codes with AVX-512, where one instruction looks up 32 words by 5 bits each."""

    unrolled = 4

    def __init__(self, function: Function, table: Pointer) -> None:
        super().__init__(function, table)
        self._twice = table.load(vector(i16, 16)).shuffled([*range(16), *range(16)])

    def levels(self, codes: Pointer, offset: Value) -> list[list[Value]]:
        """Return the levels of rows 0 to 15, and of rows 16 to 31."""
        line = codes.load(vector(i8, LINE), offset).widened(self.words)
        # vpermw reads 5 bits of each index. The 5th is part of the other code, so the table of 16
        # levels is there twice, and no instruction masks the codes.
        name = "llvm.x86.avx512.permvar.hi.512"
        nibbles = line, line >> 4
        return [[self.function.call(name, self.words, self._twice, codes) for codes in nibbles]]


class _InHalves(Unit):
    """Interleaves bytes in each half of a vector alone, as AVX2 does with 8 lanes.

    So sums are of rows 0-3 and 8-11, then of 4-7 and 12-15.
    """

    def in_order(self, sums: list[Value]) -> list[Value]:
        if self.lanes == 16:
            return sums
        lower = [0, 1, 2, 3, 8, 9, 10, 11]
        upper = [4, 5, 6, 7, 12, 13, 14, 15]
        return [
            first.shuffled(rows, second)
            for first, second in (sums[:2], sums[2:])
            for rows in (lower, upper)
        ]


def _interleaved(even: Value, odd: Value) -> list[Value]:
    """Return the numbers of two vectors by turns."""
    # In the order of vpunpcklbw and vpunpckhbw, which interleave within each 128 bits.
    count = even.type.count
    half = count // 2
    quarter = count // 4
    mixed = []
    for start in (0, quarter):
        lanes = [*range(start, start + quarter), *range(start + half, start + half + quarter)]
        mixed.append(even.shuffled([at + count * second for at in lanes for second in (0, 1)], odd))
    return mixed


class FourBits(_InHalves, WordUnit):
    """4-bit codes. It looks up the low and the high bytes of the levels."""

    unrolled = 2

    def __init__(self, function: Function, table: Pointer) -> None:
        super().__init__(function, table)
        both = table.load(self.bytes)
        self._low, self._high = (both.shuffled(2 * [*range(odd, 32, 2)]) for odd in (0, 1))

    @classmethod
    def widths(cls) -> tuple[int, ...]:
        """Return fewer for AVX-VNNI and NEON, which are slow with sums on the stack."""
        return (2, 1) if cls.cpu.multiplies_bytes or cls.apart else (4, 3, 2, 1)

    def levels(self, codes: Pointer, offset: Value) -> list[list[Value]]:
        line = codes.load(self.bytes, offset)
        nibbles = line & 0xF, _shifted(line, 4) & 0xF
        return [[words for indices in nibbles for words in self._words_at(indices)]]

    def bytes_at(self, indices: Value) -> tuple[Value, Value]:
        """Return the low and the high bytes of levels."""
        return self.looked_up(self._low, indices), self.looked_up(self._high, indices)

    def _words_at(self, indices: Value) -> list[Value]:
        low, high = self.bytes_at(indices)
        return [mixed.bits_as(self.words) for mixed in _interleaved(low, high)]


class NeonFourBits(FourBits):
    """4-bit codes with NEON, which interleaves bytes as it needs them for products."""

    apart = True

    def _words_at(self, indices: Value) -> list[Value]:
        low, high = self.bytes_at(indices)
        mixed = []
        for first in (0, LINE // 2):
            rows = [*range(first, first + 16, 2), *range(first + 1, first + 16, 2)]
            order = [at + LINE * is_high for at in rows for is_high in (0, 1)]
            mixed.append(low.shuffled(order, high).bits_as(self.words))
        return mixed

    def in_order(self, sums: list[Value]) -> list[Value]:
        return sums


def _shifted(line: Value, by: int) -> Value:
    """Return bytes with their bits shifted right. Any bits can be above them."""
    # x86 has no shift of bytes.
    words = vector(i16, line.type.count // 2)
    return (line.bits_as(words) >> by).bits_as(line.type)


class FourBitsInBytes(_InHalves, ByteUnit):
    """4-bit codes with x in 8 bits, with AVX-512 twice as fast as words, with AVX2 1.7 times."""

    columns = 4
    level_of_one = 127
    offset = 128
    decodes = True
    table_at: ClassVar[int] = BYTES_AT

    def __init__(self, function: Function, table: Pointer) -> None:
        super().__init__(function, table)
        levels = table.plus(self.table_at).load(vector(i8, 16))
        self._levels = levels.shuffled([*range(16)] * (self.lanes // 4))
        if self.permutes:
            turns = [2 * at + byte for at in _BY_TURNS for byte in (0, 1)]
            self._turns = function.constant(self.bytes, turns).hidden()

    @classmethod
    def widths(cls) -> tuple[int, ...]:
        """Return 7 for AVX-512, whose registers then hold the sums of a block and the totals."""
        return (7, 4, 3, 2, 1) if cls.lanes == 16 else super().widths()

    def levels(self, codes: Pointer, offset: Value) -> list[list[Value]]:
        """Return the levels of rows 0 to 15, then of 16 to 31, with a row's four together."""
        # Words are two columns of a row. The words of the next two columns come beside them.
        if self.permutes:
            low = [self.permuted(codes.load(self.bytes, offset), self._turns)]
        elif self.lanes == 16:
            # An instruction that takes two vectors would keep others from multiplying.
            low = [codes.load(vector(i16, LINE), offset).shuffled(_BY_TURNS).bits_as(self.bytes)]
        else:
            first, second = (
                codes.load(vector(i8, LINE), offset + start).bits_as(vector(i16, LINE // 2))
                for start in (0, LINE)
            )
            low = [pairs.bits_as(self.bytes) for pairs in _interleaved(first, second)]
        return [[*map(self._levels_of, low + [_shifted(pairs, 4) for pairs in low])]]

    def _levels_of(self, codes: Value) -> Value:
        # vpermb reads 6 bits of each index, from a table that is there four times, so nothing masks
        # the codes.
        if self.permutes:
            return self.permuted(self._levels, codes)
        return self.looked_up(self._levels, codes & 0xF)


class SignedFourBits(FourBitsInBytes):
    """4-bit codes with signed levels, of which 128 is taken off again."""

    offset = 0

    def __init__(self, function: Function, table: Pointer) -> None:
        super().__init__(function, table)
        self._levels = self._levels - 128


class FourBitDigits(Digits, FourBitsInBytes):
    """4-bit codes whose levels are exact in 8 bits."""


class _WordsOfBytes(Unit):
    """Looks up the bytes of levels that are exact in 8 bits."""

    offset = FourBitsInBytes.offset

    def bytes_at(self, indices: Value) -> tuple[Value, Value]:
        levels = self.table.plus(BYTES_AT).load(vector(i8, 16))
        table = levels.shuffled([*range(16)] * (self.lanes // 4))
        return self.looked_up(table, indices), self.function.constant(self.bytes, 0)


class _Mxfp4(Unit):
    """MXFP4. A level is a multiple of 1/2 up to 6, and exact in 16 bits and in 8.

    The scale of 32 weights is the exponent of a float. The exponent 0 (2^-127) is read as 0.
    """

    block = 32
    scale_bytes = 1

    def scales(self, absmax: Pointer, index: Value) -> Value:
        # Shifted to the exponent's place in fp32, whose denormal numbers 2^-127 would need.
        exponents = absmax.load(vector(i8, self.lanes), index).widened(self.totals)
        return (exponents << 23).bits_as(vector(f32, self.lanes))


def _in_bytes(
    level_of_one: int, short_level: int, *added: type
) -> dict[InstructionSet, list[type[Unit]]]:
    """Return units for levels of 8 bits, and for levels of 7 bits on x86 without VNNI."""
    short = {"level_of_one": short_level, "offset": 64, "table_at": SHORT_BYTES_AT}
    whole = {"level_of_one": level_of_one}
    return {
        # With 32 registers a tile has 7 tokens. Storing levels made prompts 10% slower on a Zen 4.
        "avx512": [
            on("avx512", FourBitsInBytes, *added, needs=("avx512vnni",), decodes=False, **whole),
            on("avx512", FourBitsInBytes, *added, **short),
        ],
        "avx2": [
            on("avx2", FourBitsInBytes, *added, needs=("avxvnni",), **whole),
            on("avx2", FourBitsInBytes, *added, **short),
        ],
        "neon": [on("neon", SignedFourBits, *added, needs=("dotprod",), **whole)],
    }


FOUR_BITS = UnitSet(
    4,
    {
        "avx512": on("avx512", Avx512FourBits),
        "avx2": on("avx2", FourBits),
        "neon": on("neon", NeonFourBits),
    },
    _in_bytes(127, 63),
)
# Levels are exact in 8 bits. So x has more bits than with other levels, and has them in digits.
_MEMBERS: dict[str, Any] = {"level_of_one": 20, "largest_x": LARGEST_OF_DIGITS}
MXFP4_UNITS = UnitSet(
    4,
    {
        "avx512": on("avx512", Avx512FourBits, _Mxfp4, **_MEMBERS),
        "avx2": on("avx2", FourBits, _WordsOfBytes, _Mxfp4, **_MEMBERS),
        "neon": on("neon", NeonFourBits, _WordsOfBytes, _Mxfp4, **_MEMBERS),
    },
    _in_bytes(20, 10, _Mxfp4),
    {
        "avx512": [on("avx512", FourBitDigits, _Mxfp4, needs=("avx512vnni",), **_MEMBERS)],
        "avx2": [on("avx2", FourBitDigits, _Mxfp4, needs=("avxvnni",), **_MEMBERS)],
    },
)
