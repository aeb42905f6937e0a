"""Turns codes into numbers and multiplies them, with the instructions of each kind of CPU.

A unit turns codes of 32 rows into levels (integers, the codes' numbers times `one`), and adds their
products with x (integers up to `largest_x`) to sums of 32 bits. "Words" have 16 bits. The sum over
a block of 64 columns never overflows:

    3 and 4 bits, words:  8191 * 4095 * 64 = 2,146,697,280 < 2^31   (x has 13 bits and a sign)
    3 and 4 bits, bytes:   127 *  255 * 64 =     2,072,640          (x has 7 bits and a sign)
    5 and 6 bits, words: 32767 *   63 * 64 =   132,116,544          (x has 15 bits and a sign)
    5 and 6 bits, bytes:   127 *   63 * 64 =       512,064          (x has 7 bits and a sign)
    8 bits, words:       32767 *  127 * 64 =   266,330,176          (x has 15 bits and a sign)

A line is 32 bytes for a pair of columns, with two codes in a byte. Rows 0 to 15 have the low bits,
rows 16 to 31 the bits above. With 3 bits, three lines in memory hold 6 bits of each byte, and the
two bits left over in each make up a fourth line. Other bits may remain above a code, because the
table is repeated.

The instruction for bytes takes unsigned levels, so 128 is added to each. The sums start at minus
128 times the sum of x.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

import torch

from mixchat.kernels.arithmetic import as_fp32
from mixchat.kernels.compile import InstructionSet, has_feature
from mixchat.kernels.emit import Function, Pointer, Value, i8, i16, i32, vector

MANY = 16  # tokens from which on x has 8 bits
LINE = 32  # bytes
BLOCK = 64  # weights that share a scale in most types
# The feature that multiplies and adds in one instruction. Bytes need it.
VNNI: dict[InstructionSet, str] = {"avx512": "avx512vnni", "avx2": "avxvnni"}
_BYTES_AT = 32  # bytes of the table with the levels as words, before the levels as bytes


class Unit(ABC):
    """A choice of instructions, for one function that is being written.

    `table` points to the result of `UnitSet.level_tables`. Units for codes that are numbers
    themselves do not read it.
    """

    bits: ClassVar[int] = 4  # of a code
    block: ClassVar[int] = BLOCK  # columns whose weights share a scale, and whose x do
    scale_bytes: ClassVar[int] = 2
    columns: ClassVar[int] = 2  # whose codes are read at once
    lanes: ClassVar[int]  # sums in a vector
    x_type: ClassVar[Any] = i16
    largest_x: ClassVar[int] = 8191
    one: ClassVar[int] = 4095  # the level of a code that stands for 1
    offset: ClassVar[int] = 0  # added to each level
    # The places of columns in x, within as many columns, if levels are not in their order.
    x_order: ClassVar[tuple[int, ...]] = (0,)
    unrolled: ClassVar[int]  # steps of the loop over columns that are written out
    _widths: ClassVar[tuple[int, ...]]

    def __init__(self, function: Function, table: Pointer) -> None:
        self.function, self.table = function, table

    @classmethod
    def widths(cls) -> tuple[int, ...]:
        """Return how many tokens are computed at once, the most first."""
        return cls._widths

    @abstractmethod
    def levels(self, codes: Pointer, place: Value) -> Iterable[list[Value]]:
        """Load the codes of `columns` columns, and return their levels.

        Each list has a vector of levels for each vector of sums. A lane is one row.
        """

    @abstractmethod
    def add_products(self, sums: Value, levels: Value, x: Value) -> Value:
        """Return the sums plus, lane by lane, the products of the levels with x.

        `x` is 32 bits that hold as many numbers as a lane has levels.
        """

    def scales(self, absmax: Pointer, place: Value) -> Value:
        """Load the scales of `lanes` rows as fp32."""
        return as_fp32(absmax, place, True, self.lanes)

    def in_order(self, sums: list[Value]) -> list[Value]:
        return sums


class WordUnit(Unit):
    """Adds both products of each pair of words, which LLVM joins to one instruction with VNNI."""

    _multiply: ClassVar[str]

    def __init__(self, function: Function, table: Pointer) -> None:
        super().__init__(function, table)
        self._words = vector(i16, 2 * self.lanes)

    def add_products(self, sums: Value, levels: Value, x: Value) -> Value:
        pairs = x.broadcast(self.lanes).bits_as(self._words)
        return sums + self.function.call(self._multiply, vector(i32, self.lanes), levels, pairs)


class ByteUnit(Unit):
    """Multiplies unsigned levels of 8 bits with x in 8 bits, with four products in a lane."""

    x_type, largest_x = i8, 127
    _multiply: ClassVar[str]

    def add_products(self, sums: Value, levels: Value, x: Value) -> Value:
        # LLVM 20 declares the operands as 32-bit numbers. Later versions accept that.
        kind = vector(i32, self.lanes)
        return self.function.call(
            self._multiply, kind, sums, levels.bits_as(kind), x.broadcast(self.lanes)
        )


class Avx512Words(WordUnit):
    """AVX-512 with x in words."""

    lanes, _multiply = 16, "llvm.x86.avx512.pmaddw.d.512"


class Avx2Words(WordUnit):
    """AVX2 with x in words."""

    lanes, _multiply = 8, "llvm.x86.avx2.pmadd.wd"


class Avx512DotBytes(ByteUnit):
    """AVX-512 with x in bytes."""

    lanes, _multiply = 16, "llvm.x86.avx512.vpdpbusd.512"


class Avx2DotBytes(ByteUnit):
    """AVX2 with x in bytes."""

    lanes, _multiply = 8, "llvm.x86.avx512.vpdpbusd.256"


class _Lookup(Unit):
    """Looks codes up in a table. `shift` is the distance of the two codes of a byte."""

    shift: ClassVar[int] = 4

    def lines(self, codes: Pointer, place: Value) -> list[Value]:
        return [self.line(codes, place)]

    def line(self, codes: Pointer, place: Value) -> Value:
        return codes.load(vector(i8, LINE), place)

    def shifted(self, line: Value, by: int) -> Value:
        """Return lines with their bits shifted right. Any bits can be above them."""
        words = vector(i16, line.type.count // 2)
        return (line.bits_as(words) >> by).bits_as(line.type)


class _ThreeBits(_Lookup):
    """Makes a fourth line of the two bits left over in three."""

    bits, columns, shift = 3, 8, 3

    def lines(self, codes: Pointer, place: Value) -> list[Value]:
        one, two, three = (self.line(codes, place + LINE * number) for number in range(3))
        parts = (
            (self.shifted(one, 6), 0x03),
            (self.shifted(two, 4), 0x0C),
            (self.shifted(three, 2), 0x30),
        )
        low, middle, high = (bits & mask for bits, mask in parts)
        return [one, two, three, low | middle | high]


class Avx512(_Lookup, Avx512Words):
    """AVX-512. One instruction looks up 32 codes, by 5 bits each, so the table is doubled."""

    _widths, unrolled = (8, 4, 3, 2, 1), 4

    def __init__(self, function: Function, table: Pointer) -> None:
        super().__init__(function, table)
        self._twice = table.load(vector(i16, 16)).shuffled([*range(16), *range(16)])

    def line(self, codes: Pointer, place: Value) -> Value:
        return super().line(codes, place).widened(self._words)

    def shifted(self, line: Value, by: int) -> Value:
        return line >> by

    def levels(self, codes: Pointer, place: Value) -> list[list[Value]]:
        """Return, for each pair of columns, the levels of rows 0 to 15, and of rows 16 to 31."""
        return [
            [
                self.function.call(
                    "llvm.x86.avx512.permvar.hi.512", self._words, self._twice, places
                )
                for places in (line, self.shifted(line, self.shift))
            ]
            for line in self.lines(codes, place)
        ]


class _Avx2Order(Unit):
    """Has rows 0-3 and 8-11, then 4-7 and 12-15, as AVX2 interleaves vectors in each half alone."""

    def in_order(self, sums: list[Value]) -> list[Value]:
        lower, upper = [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]
        return [
            one.shuffled(rows, other)
            for one, other in (sums[:2], sums[2:])
            for rows in (lower, upper)
        ]


def _interleaved(one: Value, other: Value) -> list[Value]:
    """Return the numbers of two vectors by turns."""
    count = one.type.count
    half, quarter = count // 2, count // 4
    mixed = []
    for start in (0, quarter):
        places = [*range(start, start + quarter), *range(start + half, start + half + quarter)]
        mixed.append(one.shuffled([at + count * odd for at in places for odd in (0, 1)], other))
    return mixed


class Avx2(_Avx2Order, _Lookup, Avx2Words):
    """AVX2. It looks up the low and the high bytes of the levels."""

    unrolled = 2

    def __init__(self, function: Function, table: Pointer) -> None:
        super().__init__(function, table)
        self._bytes = vector(i8, LINE)
        both = table.load(self._bytes)
        self._low, self._high = (both.shuffled(2 * [*range(odd, 32, 2)]) for odd in (0, 1))

    @classmethod
    def widths(cls) -> tuple[int, ...]:
        """Return fewer for AVX-VNNI, which is slow with sums on the stack."""
        return (2, 1) if has_feature(VNNI["avx2"]) else (4, 3, 2, 1)

    def levels(self, codes: Pointer, place: Value) -> list[list[Value]]:
        return [
            [
                words
                for places in (line & 0xF, self.shifted(line, self.shift) & 0xF)
                for words in self._looked_up(places)
            ]
            for line in self.lines(codes, place)
        ]

    def _looked_up(self, places: Value) -> list[Value]:
        low, high = (
            self.function.call("llvm.x86.avx2.pshuf.b", self._bytes, table, places)
            for table in (self._low, self._high)
        )
        return [mixed.bits_as(self._words) for mixed in _interleaved(low, high)]


class _Bytes(_Lookup, ByteUnit):
    """Looks up levels of 8 bits."""

    columns, one, offset = 4, 127, 128
    _look_up: ClassVar[str]

    def __init__(self, function: Function, table: Pointer) -> None:
        super().__init__(function, table)
        self._bytes = vector(i8, 4 * self.lanes)
        times = 4 * self.lanes // 16
        self._levels = table.plus(_BYTES_AT).load(vector(i8, 16)).shuffled([*range(16)] * times)

    def lines(self, codes: Pointer, place: Value) -> list[Value]:
        return [self.line(codes, place), self.line(codes, place + LINE)]

    def levels(self, codes: Pointer, place: Value) -> list[list[Value]]:
        """Return, for each four columns, the levels of rows 0 to 15, then of 16 to 31."""
        words = [line.bits_as(vector(i16, LINE // 2)) for line in self.lines(codes, place)]
        return [self._looked_up(*pair) for pair in zip(words[::2], words[1::2], strict=True)]

    def _looked_up(self, pair: Value, other: Value) -> list[Value]:
        mixed = [words.bits_as(self._bytes) for words in self.mixed(pair, other)]
        shifted = [self.shifted(one, self.shift) for one in mixed]
        return [
            self.function.call(self._look_up, self._bytes, self._levels, codes & 0xF)
            for codes in (*mixed, *shifted)
        ]

    @abstractmethod
    def mixed(self, pair: Value, other: Value) -> list[Value]:
        """Return the words of two lines by turns, so that a row's four codes lie together."""


class Avx512Bytes(_Bytes, Avx512DotBytes):
    """AVX-512 with x in 8 bits, twice as fast as words."""

    _widths, unrolled = (8, 4, 3, 2, 1), 1
    _look_up = "llvm.x86.avx512.pshuf.b.512"

    def mixed(self, pair: Value, other: Value) -> list[Value]:
        return [pair.shuffled([place + 16 * odd for place in range(16) for odd in (0, 1)], other)]


class Avx2Bytes(_Avx2Order, _Bytes, Avx2DotBytes):
    """AVX2 with x in 8 bits, 1.7 times as fast as words."""

    _widths, unrolled = (2, 1), 1
    _look_up = "llvm.x86.avx2.pshuf.b"

    def mixed(self, pair: Value, other: Value) -> list[Value]:
        return _interleaved(pair, other)


class Avx512ThreeBits(_ThreeBits, Avx512):
    """3-bit codes with AVX-512."""

    unrolled = 1


class Avx2ThreeBits(_ThreeBits, Avx2):
    """3-bit codes with AVX2."""

    unrolled = 1


class Avx512ThreeBitsBytes(_ThreeBits, Avx512Bytes):
    """3-bit codes with AVX-512, x in 8 bits."""


class Avx2ThreeBitsBytes(_ThreeBits, Avx2Bytes):
    """3-bit codes with AVX2, x in 8 bits."""


class _Int8(WordUnit):
    """8-bit codes, loaded as words with their sign."""

    bits, largest_x, one = 8, 32767, 127

    def levels(self, codes: Pointer, place: Value) -> list[list[Value]]:
        size = 2 * self.lanes
        return [
            [
                codes.load(vector(i8, size), place + start).sign_extended(self._words)
                for start in range(0, 2 * LINE, size)
            ]
        ]


class Avx512Int8(_Int8, Avx512Words):
    """8-bit codes with AVX-512."""

    _widths, unrolled = (8, 4, 3, 2, 1), 4


class Avx2Int8(_Int8, Avx2Words):
    """8-bit codes with AVX2."""

    _widths, unrolled = (2, 1), 2


class UnitSet(NamedTuple):
    """The units for codes of so many bits."""

    bits: int
    words: dict[InstructionSet, type[Unit]]
    bytes: dict[InstructionSet, type[Unit]]

    def unit_for(self, instructions: InstructionSet, tokens: int) -> type[Unit]:
        """Return the unit for so many tokens. Many are bytes if the CPU has VNNI."""
        if tokens >= MANY and instructions in self.bytes and has_feature(VNNI[instructions]):
            return self.bytes[instructions]
        return self.words[instructions]

    @property
    def block(self) -> int:
        """Return the columns whose weights share a scale."""
        return next(iter(self.words.values())).block

    def level_tables(self, levels: torch.Tensor) -> torch.Tensor:
        """Return the table that units read, uint8, of 16 or 8 levels, fp32, as words and bytes."""
        sixteen = levels.repeat(16 // len(levels))
        words, of_bytes = (next(iter(units.values())) for units in (self.words, self.bytes))
        integers = (sixteen * words.one).round().to(torch.int16).view(torch.uint8)
        assert len(integers) == _BYTES_AT
        short = (sixteen * of_bytes.one).round() + of_bytes.offset
        return torch.cat((integers, short.to(torch.uint8)))


THREE_BITS = UnitSet(
    3,
    words={"avx512": Avx512ThreeBits, "avx2": Avx2ThreeBits},
    bytes={"avx512": Avx512ThreeBitsBytes, "avx2": Avx2ThreeBitsBytes},
)
FOUR_BITS = UnitSet(
    4,
    words={"avx512": Avx512, "avx2": Avx2},
    bytes={"avx512": Avx512Bytes, "avx2": Avx2Bytes},
)
EIGHT_BITS = UnitSet(8, words={"avx512": Avx512Int8, "avx2": Avx2Int8}, bytes={})
