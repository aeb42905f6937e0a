"""Three ways to look 4-bit codes up and multiply: which instructions, and how many bits x has.

A unit reads lines of the layout "cpu-packed": 32 bytes, a pair of columns of 32 rows. It gives the
levels of their codes as whole numbers, as vectors of the products' operands, and adds products up
in lanes of 32 bits, a lane for each row. The sum over a block of 64 columns never overflows:

    words:  8191 * 4095 * 64 = 2,146,697,280 < 2^31         (x has 13 bits and a sign)
    bytes:   127 *  255 * 64 =     2,072,640                (x has 7 bits and a sign)

Instructions for bytes take one operand without a sign: 128 is added to each level, and 128 times
the sum of x, which is known, is taken off again by letting the sums begin there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import torch

from mixchat.kernels.compile import InstructionSet, has_feature
from mixchat.kernels.emit import Function, Pointer, Value, i8, i16, i32, vector

UnitName = Literal["avx512", "avx2", "avx512 bytes"]
LINE = 32  # bytes
MANY = 16  # tokens from which on x has 8 bits, where that is faster
_BYTES_AT = 32  # where the levels as bytes begin, behind those as words


class Unit(ABC):
    """What is common to all; one belongs to the function that is being written."""

    lanes: ClassVar[int]
    lines: ClassVar[int] = 1  # that are read at once
    x_type: ClassVar[Any] = i16
    largest_x: ClassVar[int] = 8191
    largest_level: ClassVar[int] = 4095
    offset: ClassVar[int] = 0  # that is added to a level
    # Tokens whose products are added up at once, most first: as many as there are registers for.
    widths: ClassVar[tuple[int, ...]]
    unrolled: ClassVar[int]  # steps

    def __init__(self, function: Function, table: Pointer) -> None:
        self.function, self.table = function, table

    @abstractmethod
    def levels(self, lines: Value) -> list[Value]:
        """The levels of the codes, a vector for each vector of sums."""

    @abstractmethod
    def add_products(self, sums: Value, levels: Value, x: Value) -> Value:
        """The sums and, lane by lane, the products of the levels with x, which is the same for
        all lanes: a number of 32 bits with as many numbers as a lane has levels."""

    def in_order(self, sums: list[Value]) -> list[Value]:
        """The sums in the order of the rows."""
        return sums


class Avx512(Unit):
    """One instruction looks 32 codes up. It reads 5 bits: the table is there twice."""

    lanes, widths, unrolled = 16, (8, 4, 2, 1), 4

    def __init__(self, function: Function, table: Pointer) -> None:
        super().__init__(function, table)
        self._words = vector(i16, 32)
        self._twice = table.load(vector(i16, 16)).picked([*range(16), *range(16)])

    def levels(self, lines: Value) -> list[Value]:
        """Of rows 0 to 15, and of rows 16 to 31."""
        words = lines.widened(self._words)
        return [
            self.function.call("llvm.x86.avx512.permvar.hi.512", self._words, self._twice, places)
            for places in (words, words >> 4)
        ]

    def add_products(self, sums: Value, levels: Value, x: Value) -> Value:
        """Of each pair both, in one instruction where the CPU has it (LLVM sees that)."""
        pairs = x.spread(self.lanes).bits_as(self._words)
        name, kind = "llvm.x86.avx512.pmaddw.d.512", vector(i32, self.lanes)
        return sums + self.function.call(name, kind, levels, pairs)


class Avx2(Unit):
    """Looks up bytes: the low and the high ones of the levels, then puts them together."""

    lanes, widths, unrolled = 8, (4, 2, 1), 2

    def __init__(self, function: Function, table: Pointer) -> None:
        super().__init__(function, table)
        self._bytes, self._words = vector(i8, 32), vector(i16, 16)
        both = table.load(self._bytes)
        self._low, self._high = (both.picked(2 * [*range(odd, 32, 2)]) for odd in (0, 1))

    def levels(self, lines: Value) -> list[Value]:
        """Of rows 0-3 and 8-11, 4-7 and 12-15, and the same from row 16."""
        shifted = (lines.bits_as(self._words) >> 4).bits_as(self._bytes)
        found = []
        for places in (lines & 0xF, shifted & 0xF):
            low, high = (
                self.function.call("llvm.x86.avx2.pshuf.b", self._bytes, table, places)
                for table in (self._low, self._high)
            )
            for start in (0, 8):  # within each half of the vector, as the instruction does it
                where = [*range(start, start + 8), *range(start + 16, start + 24)]
                mixed = low.picked([place + 32 * odd for place in where for odd in (0, 1)], high)
                found.append(mixed.bits_as(self._words))
        return found

    def add_products(self, sums: Value, levels: Value, x: Value) -> Value:
        """Of each pair both."""
        pairs = x.spread(self.lanes).bits_as(self._words)
        name, kind = "llvm.x86.avx2.pmadd.wd", vector(i32, self.lanes)
        return sums + self.function.call(name, kind, levels, pairs)

    def in_order(self, sums: list[Value]) -> list[Value]:
        """From the order of `levels`."""
        lower, upper = [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]
        return [
            one.picked(half, other)
            for one, other in (sums[:2], sums[2:])
            for half in (lower, upper)
        ]


class Avx512Bytes(Unit):
    """Four products an instruction and lane: twice as fast for many tokens, with x in 8 bits."""

    lanes, widths, unrolled, lines = 16, (8, 4, 2, 1), 1, 2
    x_type, largest_x, largest_level, offset = i8, 127, 127, 128

    def __init__(self, function: Function, table: Pointer) -> None:
        super().__init__(function, table)
        self._bytes, self._words = vector(i8, 64), vector(i16, 32)
        self._levels = table.plus(_BYTES_AT).load(vector(i8, 16)).picked([*range(16)] * 4)

    def levels(self, lines: Value) -> list[Value]:
        """Of rows 0 to 15, and of rows 16 to 31: four columns of a row one behind the other."""
        together = [place for pair in range(16) for place in (pair, pair + 16)]
        mixed = lines.bits_as(self._words).picked(together)
        shifted = (mixed >> 4).bits_as(self._bytes)
        return [
            self.function.call("llvm.x86.avx512.pshuf.b.512", self._bytes, self._levels, places)
            for places in (mixed.bits_as(self._bytes) & 0xF, shifted & 0xF)
        ]

    def add_products(self, sums: Value, levels: Value, x: Value) -> Value:
        """Of each four all."""
        # LLVM 20 knows the instruction's operands as words only; later ones understand that.
        name, kind = "llvm.x86.avx512.vpdpbusd.512", vector(i32, self.lanes)
        return self.function.call(name, kind, sums, levels.bits_as(kind), x.spread(self.lanes))


UNITS: dict[UnitName, type[Unit]] = {
    "avx512": Avx512,
    "avx2": Avx2,
    "avx512 bytes": Avx512Bytes,
}


def unit_for(instructions: InstructionSet, tokens: int) -> UnitName:
    """The unit for so many tokens: bytes where the CPU has them, and speed is what counts."""
    if instructions == "avx512" and tokens >= MANY and has_feature("avx512vnni"):
        return "avx512 bytes"
    return instructions


def level_tables(levels: torch.Tensor) -> torch.Tensor:
    """The 16 levels (fp32, -1 to 1) as all units want them: bytes."""
    words = (levels * Unit.largest_level).round().to(torch.int16).view(torch.uint8)
    assert len(words) == _BYTES_AT
    of_bytes = (levels * Avx512Bytes.largest_level).round() + Avx512Bytes.offset
    return torch.cat((words, of_bytes.to(torch.uint8)))
