"""Turns codes into numbers and multiplies them, with the instructions of each kind of CPU.

A unit turns codes of a band of rows, 32 or in a trellis 64, into levels (integers, the codes'
numbers times `level_of_one`), and adds their products with x (integers up to `largest_x`) to sums
of 32 bits. "Words" have 16 bits. The sum over a block of 64 columns never overflows:

    4 bits, words:        8191 * 4095 * 64 = 2,146,697,280 < 2^31   (x has 13 bits and a sign)
    MXFP4, words:        32639 *  248 * 32 =   259,023,104          (x has 15 bits and a sign)
    4 bits, bytes:         127 *  255 * 64 =     2,072,640          (x has 7 bits and a sign)
    4 bits, short bytes:   127 *  127 * 64 =     1,032,256          (x has 7 bits and a sign)
    6 bits, words:       32639 *   63 * 64 =   131,600,448          (x has 15 bits and a sign)
    6 bits, bytes:         127 *   63 * 64 =       512,064          (x has 7 bits and a sign)
    8 bits, words:       32767 *  127 * 64 =   266,330,176          (x has 15 bits and a sign)
    trellis, bytes:        127 *  127 * 64 =     1,032,256          (x has 7 bits and a sign)

Levels in bytes are signed for NEON, and unsigned for the others. x86 without VNNI adds two products
in 16 bits, so levels in short bytes have 7 bits: 127 * 127 * 2 = 32,258 < 2^15. The sums of levels
with an offset start at minus the offset times the sum of x.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, cast

import torch

from mixchat.kernels.cpu.arithmetic import as_fp32
from mixchat.kernels.cpu.compile import CPUS, LANES, Cpu, InstructionSet, has_feature
from mixchat.kernels.cpu.emit import Function, Pointer, Value, i8, i16, i32, vector

MANY = 16  # tokens from which on x has 8 bits
BAND = 32  # rows, in most types
BLOCK = 64  # weights that share a scale in most types
LARGEST_OF_DIGITS = 127 * 256 + 127  # x in two digits, signed bytes
BYTES_AT = 32  # bytes of the table with the levels as words, before the levels as bytes
SHORT_BYTES_AT = BYTES_AT + 16  # bytes before the levels of 7 bits, as bytes


class Unit(ABC):
    """A choice of instructions, for one function that is being written.

    `table` points to the result of `UnitSet.level_tables`. Units for codes that are numbers
    themselves do not read it. `on` completes a unit for a set of instructions.
    """

    cpu: ClassVar[Cpu]
    lanes: ClassVar[int]  # sums in a vector
    bits: ClassVar[int] = 4  # of a code
    band: ClassVar[int] = BAND  # rows that are interleaved
    block: ClassVar[int] = BLOCK  # columns whose weights share a scale, and whose x do
    scale_bytes: ClassVar[int] = 2
    columns: ClassVar[int] = 2  # whose codes are read at once
    x_type: ClassVar[Any] = i16
    largest_x: ClassVar[int] = 8191
    level_of_one: ClassVar[int] = 4095  # the level of a code that stands for 1
    offset: ClassVar[int] = 0  # added to each level
    x_order: ClassVar[tuple[int, ...]] = (0, 1, 2, 3)  # of each four columns in x
    unrolled: ClassVar[int] = 1  # steps of the loop over columns that are written out
    needs: ClassVar[tuple[str, ...]] = ()  # more features of the CPU, by LLVM's names
    decodes: ClassVar[bool] = False  # whether levels are stored first for more tokens than one

    def __init__(self, function: Function, table: Pointer) -> None:
        self.function = function
        self.table = table
        self.bytes, self.words, self.totals = (
            vector(element, 32 * self.lanes // element.width) for element in (i8, i16, i32)
        )
        self.permutes = self.lanes == 16 and has_feature("avx512vbmi")  # whether it has `permuted`

    @classmethod
    def widths(cls) -> tuple[int, ...]:
        """Return how many tokens are computed at once, the most first, as registers allow."""
        return (8, 4, 3, 2, 1) if cls.lanes == 16 else (2, 1)

    @classmethod
    def wide_widths(cls) -> Sequence[int]:
        """Return for how many tokens two bands are computed at once, as registers allow."""
        return range(1, min(3, cls.widths()[0]) + 1) if cls.lanes == 16 else (1,)

    @abstractmethod
    def levels(self, codes: Pointer, offset: Value) -> Iterable[Iterable[Value]]:
        """Load the codes of `columns` columns, `offset` bytes on, and return their levels.

        Each element has a vector of levels for each vector of sums. A lane is one row.
        """

    @abstractmethod
    def add_products(self, sums: Value, levels: Value, x: Value) -> Value:
        """Return the sums plus, lane by lane, the products of the levels with x.

        `x` is 32 bits that hold as many numbers as a lane has levels.
        """

    @classmethod
    def passes(cls, function: Function, table: Pointer) -> list[Unit]:
        """Return the units whose sums, one after the other, are the sums of a band."""
        return [cls(function, table)]

    @classmethod
    def multiplier(cls) -> type[Unit]:
        """Return the unit that multiplies levels with several tokens."""
        return cls

    @property
    def sums(self) -> int:
        """Return the count of vectors of sums."""
        return self.band // self.lanes

    @property
    def columns_at_once(self) -> int:
        """Return the columns of a list of levels."""
        return 32 // int(self.x_type.width)

    @classmethod
    def arranged(cls, x: Value) -> Value:
        """Return `lanes` rounded numbers of x as they are stored for `add`."""
        size = len(cls.x_order)
        order = [start + at for start in range(0, cls.lanes, size) for at in cls.x_order]
        return x.narrowed(vector(cls.x_type, cls.lanes)).shuffled(order)

    def load_x(self, x: Pointer, offset: Value) -> Value:
        """Load x of `columns_at_once` columns, `offset` bytes on, for `add_products`."""
        return x.load(i32, offset)

    def add(
        self, sums: list[Value], levels: Iterable[Value], x: Pointer, offset: Value
    ) -> list[Value]:
        """Return a token's sums of a band plus the products of levels with x, `offset` bytes on."""
        numbers = self.load_x(x, offset)
        return [
            self.add_products(total, of_rows, numbers)
            for total, of_rows in zip(sums, levels, strict=True)
        ]

    def start(self, total: Value) -> Value:
        """Return sums that start at `total`, 32 bits."""
        return total.broadcast(self.lanes)

    def starts_of(self, total: Value) -> list[Value]:
        """Return a token's sums of a band, which together start at `total`, 32 bits."""
        return [self.start(total)] * self.sums

    def scales(self, absmax: Pointer, index: Value) -> Value:
        """Load the scales of `lanes` rows as fp32, from number `index` on."""
        return as_fp32(absmax, index, True, self.lanes)

    def in_order(self, sums: list[Value]) -> list[Value]:
        """Return a block's sums in the order of the scales."""
        return sums

    def in_rows(self, band: Value, totals: list[Value]) -> Iterator[tuple[Value, Value]]:
        """Yield the first row of some totals of a band, and the totals, in the order of rows."""
        for number, total in enumerate(totals):
            yield band * self.band + number * self.lanes, total

    def looked_up(self, table: Value, indices: Value) -> Value:
        """Return the bytes of a table at these indices, below 16."""
        # pshufb looks up within each 128 bits, so the table repeats its 16 bytes in all of them.
        return self.function.call_by_parts(self.cpu.look_up, self.cpu.operand_bytes, table, indices)

    def permuted(self, table: Value, indices: Value) -> Value:
        """Return the bytes of a table of 64 at these indices, by 6 bits of each."""
        return self.function.call("llvm.x86.avx512.permvar.qi.512", self.bytes, table, indices)


class WordUnit(Unit):
    """Multiplies words, with two products in a lane."""

    apart: ClassVar[bool] = False  # whether the levels of two columns are not interleaved

    def add_products(self, sums: Value, levels: Value, x: Value) -> Value:
        # With VNNI, LLVM joins pmaddwd and the addition to one instruction, vpdpwssd.
        if self.cpu.add_words is not None:
            pairs = x.broadcast(self.lanes).bits_as(self.words)
            return sums + self.function.call(self.cpu.add_words, self.totals, levels, pairs)
        # NEON: LLVM makes smlal of this, which widens, multiplies and adds.
        for column in (0, 1):
            factor = (x >> 16 * column).narrowed(i16).broadcast(self.lanes)
            of_column = levels.half(column) if self.apart else levels.every_second(column)
            sums = sums + of_column.sign_extended(self.totals) * factor.sign_extended(self.totals)
        return sums


class ByteUnit(Unit):
    """Multiplies levels of 8 bits with x in 8 bits, with four products in a lane.

    Levels have 7 bits without a sign if the CPU has no instruction that adds four products.
    """

    x_type = i8
    largest_x = 127

    def add_products(self, sums: Value, levels: Value, x: Value) -> Value:
        x = x if x.type == self.totals else x.broadcast(self.lanes)
        cpu = self.cpu
        if cpu.multiplies_bytes:
            operand_type = self.totals if cpu.operand_bits == 32 else self.bytes
            operands = levels.bits_as(operand_type), x.bits_as(operand_type)
            return self.function.call_by_parts(cpu.add_bytes, cpu.operand_bytes, sums, *operands)
        x = x.bits_as(self.bytes)
        # Pairs of products are added up in words, and then pairs of words.
        if cpu.add_pairs is not None and cpu.add_words is not None:
            words = self.function.call(cpu.add_pairs, self.words, levels.bits_as(self.bytes), x)
            ones = self.function.constant(self.words, 1)
            return sums + self.function.call(cpu.add_words, self.totals, words, ones)
        wide = vector(i16, self.bytes.count)
        products = levels.bits_as(self.bytes).sign_extended(wide) * x.sign_extended(wide)
        words = products.every_second(0) + products.every_second(1)
        for first in (0, 1):
            sums = sums + words.every_second(first).sign_extended(self.totals)
        return sums

    @classmethod
    def multiplier(cls) -> type[Unit]:
        return type(f"Stored_{cls.__name__}", (Stored, cls), {}) if cls.decodes else cls

    def decode(self, codes: Pointer, offset: Value, out: Pointer, column: Value) -> None:
        """Store the levels of `columns` columns as `Stored` reads them, four columns in a lane."""
        for group, levels in enumerate(self.levels(codes, offset)):
            lanes = self.in_order([each.bits_as(self.totals) for each in levels])
            first = (column + group * self.columns_at_once) * BAND
            for number, rows in enumerate(lanes):
                out.store(rows, first + number * 4 * self.lanes)


class Stored(ByteUnit):
    """Levels of half a band or of a whole one, 32 rows, which `ByteUnit.decode` has stored.

    On a Zen 4 limited to AVX2, prompts of Qwen3 took 3.0 s instead of 4.8 with them.
    """

    bits = 8
    band = BAND
    columns = 4
    unrolled = 4

    @classmethod
    def widths(cls) -> tuple[int, ...]:
        return (2, 1) if cls.lanes == 8 else (7, 4, 3, 2, 1)

    def levels(self, codes: Pointer, offset: Value) -> Iterator[list[Value]]:
        size = 4 * self.lanes
        yield [codes.load(self.bytes, offset + start) for start in range(0, 4 * BAND, size)]

    def in_order(self, sums: list[Value]) -> list[Value]:
        return sums


class Digits(ByteUnit):
    """Multiplies bytes with both digits of x, signed bytes, for one token: x = low + 256 high.

    Levels in bytes take half the instructions of levels in words. The sums of both digits are added
    after a block. They are integers, so the result has the bits of units for words.
    """

    x_type = i16
    largest_x = LARGEST_OF_DIGITS
    decodes = False

    @classmethod
    def widths(cls) -> tuple[int, ...]:
        return (1,)

    @property
    def sums(self) -> int:
        """Return the count of vectors of sums, of the low digits, then of the high ones."""
        return 2 * super().sums

    @property
    def columns_at_once(self) -> int:
        return len(self.x_order)

    @classmethod
    def arranged(cls, x: Value) -> Value:
        # The low digits of four columns, then the high ones.
        count = len(cls.x_order)
        order = [
            2 * (first + column) + digit
            for first in range(0, cls.lanes, count)
            for digit in (0, 1)
            for column in cls.x_order
        ]
        # The low byte of x + 128 is the low digit plus 128.
        pairs = (x + 128 ^ 128).narrowed(vector(i16, cls.lanes))
        return pairs.bits_as(vector(i8, 2 * cls.lanes)).shuffled(order)

    def add(
        self, sums: list[Value], levels: Iterable[Value], x: Pointer, offset: Value
    ) -> list[Value]:
        of_rows, size = [*levels], len(sums) // 2
        low = super().add(sums[:size], of_rows, x, offset)
        return low + super().add(sums[size:], of_rows, x, offset + len(self.x_order))

    def starts_of(self, total: Value) -> list[Value]:
        zero = self.function.constant(self.totals, 0)
        return [start for start in (self.start(total), zero) for _ in range(self.sums // 2)]

    def in_order(self, sums: list[Value]) -> list[Value]:
        size = len(sums) // 2
        pairs = zip(sums[:size], sums[size:], strict=True)
        return super().in_order([low + (high << 8) for low, high in pairs])


class EightBits(WordUnit):
    """8-bit codes, loaded as words with their sign."""

    bits = 8
    largest_x = 32767
    level_of_one = 127
    unrolled = 2

    def levels(self, codes: Pointer, offset: Value) -> list[list[Value]]:
        size = 2 * self.lanes
        starts = range(0, 2 * BAND, size)
        loaded = (codes.load(vector(i8, size), offset + start) for start in starts)
        return [[line.sign_extended(self.words) for line in loaded]]


def on(instructions: InstructionSet, unit: type, *added: type, **changes: Any) -> type[Unit]:
    """Return a unit for a set of instructions, with more or other members.

    Its name tells it from all others, because it is a part of the key of its machine code.
    """
    members = {"cpu": CPUS[instructions], "lanes": LANES[instructions], **changes}
    bases = (*added, unit)
    name = "_".join([*(base.__name__ for base in bases), instructions])
    details = "".join(f" {member}={value}" for member, value in changes.items())
    return cast(type[Unit], type(name + details, bases, members))


def on_each(unit: type, *added: type, **changes: Any) -> dict[InstructionSet, type[Unit]]:
    """Return a unit for each set of instructions."""
    return {instructions: on(instructions, unit, *added, **changes) for instructions in CPUS}


class UnitSet(NamedTuple):
    """The units for codes of `bits` bits. Of `many` and `alone`, the first that the CPU can run.

    `many` are for `MANY` tokens and more. `alone` are for one token, with the bits of `words`.
    """

    bits: int
    words: dict[InstructionSet, type[Unit]]
    many: Mapping[InstructionSet, Sequence[type[Unit]]]
    alone: Mapping[InstructionSet, Sequence[type[Unit]]] = MappingProxyType({})

    @property
    def band(self) -> int:
        """Return the rows that are interleaved."""
        return next(iter(self.words.values())).band

    @property
    def block(self) -> int:
        """Return the columns whose weights share a scale."""
        return next(iter(self.words.values())).block

    def unit_for(
        self, instructions: InstructionSet, tokens: int, alone: bool = False
    ) -> type[Unit]:
        """Return the unit for `tokens` tokens.

        alone: whether there is never more than one token.
        """
        choices = self.many if tokens >= MANY else self.alone if alone else {}
        possible = (
            unit for unit in choices.get(instructions, ()) if all(map(has_feature, unit.needs))
        )
        return next(possible, self.words[instructions])

    def level_tables(self, levels: torch.Tensor) -> torch.Tensor:
        """Return the table that units read, uint8, of 16 levels, fp32: words, then bytes."""
        words = next(iter(self.words.values()))
        integers = (levels * words.level_of_one).round().to(torch.int16).view(torch.uint8)
        assert len(integers) == BYTES_AT
        tables = [integers]
        for unit in self.many["avx2"]:
            tables.append(((levels * unit.level_of_one).round() + unit.offset).to(torch.uint8))
        return torch.cat(tables)


EIGHT_BITS = UnitSet(8, on_each(EightBits) | {"avx512": on("avx512", EightBits, unrolled=4)}, {})
