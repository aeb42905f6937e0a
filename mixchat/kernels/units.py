"""Five ways to turn codes into numbers and to multiply them: their instructions, the bits of x.

The numbers are integers: the levels that the codes stand for (-1 to 1, times `largest_level`) and
x (scaled to at most `largest_x`). A unit reads a line of the layout "cpu-packed": a pair of columns
of 32 rows. It turns the codes into levels, and adds their products with x to sums of 32 bits, one
for each row. Codes of 4 bits are looked up in a table; those of 8 bits are their levels themselves.
"Words" have 16 bits. The sum over a block of 64 columns never overflows:

    4 bits, words:  8191 * 4095 * 64 = 2,146,697,280 < 2^31         (x has 13 bits and a sign)
    4 bits, bytes:   127 *  255 * 64 =     2,072,640                (x has 7 bits and a sign)
    8 bits, words: 32767 *  127 * 64 =   266,330,176                (x has 15 bits and a sign)

The instruction for bytes takes unsigned levels: 128 is added to each. So a sum is too large by 128
times the sum of x over the block, which is known beforehand: the sums start at minus that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import torch

from mixchat.kernels.compile import InstructionSet, has_feature
from mixchat.kernels.emit import Function, Pointer, Value, i8, i16, i32, vector

UnitName = Literal["avx512", "avx2", "avx512 bytes", "avx512 int8", "avx2 int8"]
MANY = 16  # tokens from which on x has 8 bits, on CPUs where that is faster
_BYTES_AT = 32  # bytes: in the table, the levels as words come before the levels as bytes


class Unit(ABC):
    """A choice of instructions, for one function that is being written.

    `table` points to the result of `level_tables`, which units for 8-bit codes do not read.
    """

    lanes: ClassVar[int]  # sums in a vector
    line: ClassVar[int] = 32  # bytes
    lines: ClassVar[int] = 1  # read at once
    x_type: ClassVar[Any] = i16
    largest_x: ClassVar[int] = 8191
    largest_level: ClassVar[int] = 4095
    offset: ClassVar[int] = 0  # added to each level
    # Tokens that are computed at once, the most first: as many as there are registers for.
    widths: ClassVar[tuple[int, ...]]
    unrolled: ClassVar[int]  # steps of the loop over lines that are written out

    def __init__(self, function: Function, table: Pointer) -> None:
        self.function, self.table = function, table

    @abstractmethod
    def levels(self, codes: Pointer, place: Value) -> list[Value]:
        """Load `lines` lines of codes and return their levels, a vector for each vector of sums.

        A lane, one row, has the levels of 2 columns, or 4 if two lines are read at once.
        """

    @abstractmethod
    def add_products(self, sums: Value, levels: Value, x: Value) -> Value:
        """Return the sums plus, lane by lane, the products of the levels with x.

        `x`: one number of 32 bits, in which lie as many numbers of x as a lane has levels.
        """

    def in_order(self, sums: list[Value]) -> list[Value]:
        """Return the sums in the order of the rows."""
        return sums

    def _load(self, codes: Pointer, place: Value) -> Value:
        return codes.load(vector(i8, self.lines * self.line), place)


class _Words(Unit):
    """Adds both products of each pair of words; with VNNI, LLVM makes one instruction of it."""

    _multiply: ClassVar[str]

    def __init__(self, function: Function, table: Pointer) -> None:
        super().__init__(function, table)
        self._words = vector(i16, 2 * self.lanes)

    def add_products(self, sums: Value, levels: Value, x: Value) -> Value:
        """Add both products of each pair."""
        pairs = x.broadcast(self.lanes).bits_as(self._words)
        return sums + self.function.call(self._multiply, vector(i32, self.lanes), levels, pairs)


class _Avx512Words(_Words):
    lanes, _multiply = 16, "llvm.x86.avx512.pmaddw.d.512"


class _Avx2Words(_Words):
    lanes, _multiply = 8, "llvm.x86.avx2.pmadd.wd"


class Avx512(_Avx512Words):
    """AVX-512: one instruction looks up 32 codes, by 5 bits each, so the table is there twice."""

    widths, unrolled = (8, 4, 2, 1), 4

    def __init__(self, function: Function, table: Pointer) -> None:
        super().__init__(function, table)
        self._twice = table.load(vector(i16, 16)).shuffled([*range(16), *range(16)])

    def levels(self, codes: Pointer, place: Value) -> list[Value]:
        """Return the levels of rows 0 to 15, and of rows 16 to 31."""
        words = self._load(codes, place).widened(self._words)
        return [
            self.function.call("llvm.x86.avx512.permvar.hi.512", self._words, self._twice, places)
            for places in (words, words >> 4)
        ]


class Avx2(_Avx2Words):
    """AVX2: looks up the low and the high bytes of the levels, and puts them together to words."""

    widths, unrolled = (4, 2, 1), 2

    def __init__(self, function: Function, table: Pointer) -> None:
        super().__init__(function, table)
        self._bytes = vector(i8, 32)
        both = table.load(self._bytes)
        self._low, self._high = (both.shuffled(2 * [*range(odd, 32, 2)]) for odd in (0, 1))

    def levels(self, codes: Pointer, place: Value) -> list[Value]:
        """Return the levels of rows 0-3 and 8-11, of 4-7 and 12-15, and the same from row 16 on."""
        lines = self._load(codes, place)
        shifted = (lines.bits_as(self._words) >> 4).bits_as(self._bytes)
        found = []
        for places in (lines & 0xF, shifted & 0xF):
            low, high = (
                self.function.call("llvm.x86.avx2.pshuf.b", self._bytes, table, places)
                for table in (self._low, self._high)
            )
            for start in (0, 8):  # within each half of the vector, as the instruction does it
                where = [*range(start, start + 8), *range(start + 16, start + 24)]
                mixed = low.shuffled([place + 32 * odd for place in where for odd in (0, 1)], high)
                found.append(mixed.bits_as(self._words))
        return found

    def in_order(self, sums: list[Value]) -> list[Value]:
        """Return the sums in the order of the rows, out of that of `levels`."""
        lower, upper = [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]
        return [
            one.shuffled(rows, other)
            for one, other in (sums[:2], sums[2:])
            for rows in (lower, upper)
        ]


class Avx512Bytes(Unit):
    """AVX-512 with x in 8 bits: four products in an instruction and lane, twice as fast."""

    lanes, widths, unrolled, lines = 16, (8, 4, 2, 1), 1, 2
    x_type, largest_x, largest_level, offset = i8, 127, 127, 128

    def __init__(self, function: Function, table: Pointer) -> None:
        super().__init__(function, table)
        self._bytes, self._words = vector(i8, 64), vector(i16, 32)
        self._levels = table.plus(_BYTES_AT).load(vector(i8, 16)).shuffled([*range(16)] * 4)

    def levels(self, codes: Pointer, place: Value) -> list[Value]:
        """Return the levels of rows 0 to 15, and of rows 16 to 31: four columns of a row a lane."""
        together = [place for pair in range(16) for place in (pair, pair + 16)]
        mixed = self._load(codes, place).bits_as(self._words).shuffled(together)
        shifted = (mixed >> 4).bits_as(self._bytes)
        return [
            self.function.call("llvm.x86.avx512.pshuf.b.512", self._bytes, self._levels, places)
            for places in (mixed.bits_as(self._bytes) & 0xF, shifted & 0xF)
        ]

    def add_products(self, sums: Value, levels: Value, x: Value) -> Value:
        """Add all four products of each lane."""
        # LLVM 20 declares the operands as 32-bit numbers; later versions accept that.
        name, kind = "llvm.x86.avx512.vpdpbusd.512", vector(i32, self.lanes)
        return self.function.call(name, kind, sums, levels.bits_as(kind), x.broadcast(self.lanes))


class _Int8(_Words):
    """8-bit codes: loaded as words, with their sign."""

    line, largest_x, largest_level = 64, 32767, 127

    def levels(self, codes: Pointer, place: Value) -> list[Value]:
        """Return the codes, of as many rows a vector as it has lanes."""
        size = 2 * self.lanes
        return [
            codes.load(vector(i8, size), place + start).sign_extended(self._words)
            for start in range(0, self.line, size)
        ]


class Avx512Int8(_Int8, _Avx512Words):
    """8-bit codes with AVX-512."""

    widths, unrolled = (8, 4, 2, 1), 4


class Avx2Int8(_Int8, _Avx2Words):
    """8-bit codes with AVX2."""

    widths, unrolled = (2, 1), 2


UNITS: dict[UnitName, type[Unit]] = {
    "avx512": Avx512,
    "avx2": Avx2,
    "avx512 bytes": Avx512Bytes,
    "avx512 int8": Avx512Int8,
    "avx2 int8": Avx2Int8,
}
INT8_UNITS: dict[InstructionSet, UnitName] = {"avx512": "avx512 int8", "avx2": "avx2 int8"}


def unit_for(instructions: InstructionSet, tokens: int) -> UnitName:
    """Return the unit for 4-bit codes and so many tokens: for many, bytes, if the CPU has VNNI."""
    if instructions == "avx512" and tokens >= MANY and has_feature("avx512vnni"):
        return "avx512 bytes"
    return instructions


def level_tables(levels: torch.Tensor) -> torch.Tensor:
    """Return the table that units read, for 16 levels (fp32, -1 to 1): uint8, words then bytes."""
    words = (levels * Unit.largest_level).round().to(torch.int16).view(torch.uint8)
    assert len(words) == _BYTES_AT
    of_bytes = (levels * Avx512Bytes.largest_level).round() + Avx512Bytes.offset
    return torch.cat((words, of_bytes.to(torch.uint8)))
