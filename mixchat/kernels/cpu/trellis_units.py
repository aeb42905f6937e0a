"""Turns the codes of a trellis into numbers and multiplies them, with each kind of instructions.

A band is 64 rows. In a column of a band each row has one bit in a ring, and one in each plane. The
window of row r is the `WINDOW` bits of the ring from bit r on. Bits 12 to 15 of its product with
`FACTOR` are its subset. With the row's bits of the planes above them, they are an index into a
table of levels.

Row r is 16 j + 8 p + i. A pass computes the rows of one p. A turn computes the rows of one i:

- A word of 16 bits holds the bits of the ring for one j. A lane of 32 bits holds words of two
  columns, and the next lane those of j + 1. Columns 0 and 2 of four are in one vector, and columns
  1 and 3 in another. Bytes of both together are four columns in a lane, as the instructions for
  bytes need them.
- The planes are stored as such bytes, with the bits of the 8 turns in a byte (two planes: in two).
- A subset is the sum, in 4 bits, of what two fields of the ring add. The first field has a window's
  lower bits, with bits 0 to 2 among them, because the subset lacks the last 3 bits of the product.
  The second field has the upper bits, which add multiples of 8 to the product. A field of 4 bits
  serves 2 turns. A field of 6 bits serves 4 turns, for AVX-512 with VBMI.

So lanes have different columns, which are added up after a block. Memory holds 16 columns of a band
one after the other: 64 bytes with the ring of columns 0 and 2 of each four, 64 bytes of columns 1
and 3, and the planes of the first pass, then of the second.

x has 7 bits and a sign, for one token and for many, so that all have the same bits. Levels are
short bytes on every CPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from mixchat.kernels.cpu.compile import CPUS
from mixchat.kernels.cpu.emit import Function, Pointer, Value, f32, i8, i32, vector
from mixchat.kernels.cpu.units import BAND, ByteUnit, Stored, Unit, UnitSet, on

RING = 64  # rows
WINDOW = 7  # bits
# The best factor of those tried, by the error of normal numbers. In 16 bits, bits above the window
# do not change the product.
FACTOR = 61 << 16 - WINDOW
COLUMNS = 16  # whose codes lie together
TURNS = 8
SUBSET_BITS = 4  # of an index
_SUBSETS = 1 << SUBSET_BITS
SCALE_EXPONENT = 102  # of the number that a scale of 8 bits is multiplied with
_VECTOR = 64  # bytes, in memory
_ROWS_OF_LANES = RING // 16  # lanes with the same columns


def subset(window: int) -> int:
    """Return the subset of a window. Bits above the window do not change it."""
    return (window * FACTOR & 0xFFFF) >> 16 - SUBSET_BITS


class _LevelBytes(ByteUnit):
    """Multiplies levels of 7 bits with x in 7 bits and a sign."""

    scale_bytes = 1
    level_of_one = 64
    offset = 64

    def scales(self, absmax: Pointer, index: Value) -> Value:
        """Load 5 bits of exponent and 3 of mantissa as fp32."""
        # Shifted to their place in fp32 they are tiny. A power of two makes up for the exponent.
        bits = absmax.load(vector(i8, self.lanes), index).widened(self.totals)
        return (bits << 20).bits_as(vector(f32, self.lanes)) * 2.0**SCALE_EXPONENT

    def rows_of_pass(self, first: Value, totals: list[Value]) -> Iterator[tuple[Value, Value]]:
        """Yield totals of a pass, which have the j of turn 0, then of turn 1, by rows."""
        vectors = totals
        while len(vectors) > 1:
            pairs = zip(vectors[::2], vectors[1::2], strict=True)
            vectors = [low.shuffled([*range(2 * low.type.count)], high) for low, high in pairs]
        for j in range(_ROWS_OF_LANES):
            lanes = [_ROWS_OF_LANES * turn + j for turn in range(TURNS)]
            yield first + 16 * j, vectors[0].shuffled(lanes)


class Trellis(_LevelBytes):
    """Codes of 2 or 3 bits. An object computes the rows of one pass."""

    bits = 2
    band = RING
    columns = COLUMNS
    decodes = True

    def __init__(self, function: Function, table: Pointer, half: int = 0) -> None:
        super().__init__(function, table)
        self._half = half
        self._planes = self.bits - 1
        self._table = table.load(vector(i8, 2 ** (SUBSET_BITS + self._planes)))
        self._field = 6 if self.permutes else 4  # bits
        if self.permutes:
            words = {mask: function.constant(self.words, mask) for mask in (0xFF, 0x303, 0xF0F)}
            self._masks = {mask: word.hidden() for mask, word in words.items()}

    @classmethod
    def passes(cls, function: Function, table: Pointer) -> list[Unit]:
        return [cls(function, table, half) for half in (0, 1)]

    @classmethod
    def wide_widths(cls) -> Sequence[int]:
        return (1,)  # the levels of several tokens are decoded first

    @property
    def sums(self) -> int:
        return TURNS

    @property
    def columns_at_once(self) -> int:
        return 4 * self.lanes // _ROWS_OF_LANES

    def levels(self, codes: Pointer, offset: Value) -> Iterator[Iterable[Value]]:
        """Yield the levels of `columns_at_once` columns, for each turn."""
        for start in range(0, _VECTOR, 4 * self.lanes):
            yield self._levels_of_turns(codes, offset + start)

    def _levels_of_turns(self, codes: Pointer, offset: Value) -> Iterator[Value]:
        # Sums take each turn's levels before the next ones are written, or registers would not do.
        even, odd = (codes.load(self.words, offset + parity * _VECTOR) for parity in (0, 1))
        ring = self._merged(0xFF, even, odd << 8)
        next_bits = self._merged(0xFF, even >> 8, odd)
        if self._half:
            # The second pass begins 8 rows on. Its last windows reach into the next j's words.
            ring, next_bits = next_bits, self._of_next_j(ring)
        first_plane = (2 + self._half * self._planes) * _VECTOR
        planes = [
            codes.load(self.words, offset + first_plane + plane * _VECTOR)
            for plane in range(self._planes)
        ]
        turns_of_byte = 8 // self._planes
        for turn, subsets in enumerate(self._subsets(ring, next_bits)):
            number, turn_of_byte = divmod(turn, turns_of_byte)
            yield self._level_of(subsets, planes[number], turn_of_byte * self._planes)

    def _of_next_j(self, words: Value) -> Value:
        rows = _ROWS_OF_LANES
        lanes = [at - at % rows + (at + 1) % rows for at in range(self.lanes)]
        return words.bits_as(self.totals).shuffled(lanes).bits_as(self.words)

    def _subsets(self, ring: Value, next_bits: Value) -> Iterator[Value]:
        """Yield the subsets of each turn, in bytes, plus multiples of 16, without the bit 128.

        Bytes of `ring` have the 8 bits from turn 0 on, and bytes of `next_bits` the bits after.
        """
        turns = self._field - 2
        for first in range(0, TURNS, turns):
            lower, upper = (
                self._field_at(ring, next_bits, bit) for bit in (first, first + self._field)
            )
            for turn in range(turns):
                yield self._sum_of_fields(lower, upper, turn)

    def _field_at(self, ring: Value, next_bits: Value, bit: int) -> Value:
        """Return the field from a bit of the ring on."""
        field = (ring if bit < 8 else next_bits) >> bit % 8
        if bit % 8 + self._field > 8:
            field = self._merged((0xFF >> bit) * 0x101, field, next_bits << 8 - bit)
        # vpermb ignores the bits above its field.
        return field if self.permutes else field & 0xF0F

    def _merged(self, mask: int, low: Value, high: Value) -> Value:
        """Return words with the bits of `low` within the mask, and those of `high` elsewhere."""
        if not self.permutes:
            return low & mask | high & (0xFFFF ^ mask)
        # LLVM would make two instructions of it, or vpermt2b, which is slower on Intel.
        operands = [bits.bits_as(self.totals) for bits in (self._masks[mask], low, high)]
        truth = self.function.constant(i32, 0xCA)
        name = "llvm.x86.avx512.pternlog.d.512"
        return self.function.call(name, self.totals, *operands, truth).bits_as(self.words)

    def _sum_of_fields(self, lower: Value, upper: Value, turn: int) -> Value:
        """Return the subsets whose windows begin at bit `turn` of their lower fields."""
        numbers = range(1 << self._field)
        low = [subset(number >> turn) for number in numbers]
        up = self._field - turn
        if self.permutes or self.cpu.multiplies_bytes:
            # These CPUs look up twice in a cycle.
            high = [subset(number << up) for number in numbers]
            return self._added_by(lower, low) + self._added_by(upper, high)
        # In a window's 7 bits 61 * 8 is -3 * 8. Multiples of 16 keep the difference positive.
        factor = 3 << up - 3
        low = [number + 16 * factor for number in low]
        return self._added_by(lower, low) - (upper * factor).bits_as(self.bytes)

    def _added_by(self, field: Value, numbers: list[int]) -> Value:
        """Return the bytes of a table of numbers, one for each value of a field."""
        count = self.bytes.count // len(numbers)
        table = self.function.constant(self.bytes, numbers * count)
        look_up = self.permuted if self.permutes else self.looked_up
        return look_up(table, field.bits_as(self.bytes))

    def _level_of(self, subsets: Value, planes: Value, first: int) -> Value:
        """Return the levels of bytes. The bits of their planes begin at bit `first`."""
        starts = range(0, self._table.type.count, _SUBSETS)
        levels = [self.looked_up(self._repeated(start, _SUBSETS), subsets) for start in starts]
        for plane in range(self._planes):
            is_set = (planes << 7 - first - plane).bits_as(self.bytes).compare("<", 0)
            pairs = zip(levels[::2], levels[1::2], strict=True)
            levels = [is_set.choose(upper, lower) for lower, upper in pairs]
        return levels[0]

    def _repeated(self, start: int, count: int) -> Value:
        """Return some levels of the table, again and again."""
        return self._table.shuffled([start + at % count for at in range(self.bytes.count)])

    def load_x(self, x: Pointer, offset: Value) -> Value:
        fours = x.load(vector(i32, self.lanes // _ROWS_OF_LANES), offset)
        return fours.shuffled([lane // _ROWS_OF_LANES for lane in range(self.lanes)])

    def start(self, total: Value) -> Value:
        # Only in the lanes of the first columns, because the lanes of a row are added up.
        once = [-1] * _ROWS_OF_LANES + [0] * (self.lanes - _ROWS_OF_LANES)
        return super().start(total) & self.function.constant(self.totals, once)

    def in_order(self, sums: list[Value]) -> list[Value]:
        """Add up the lanes of different columns."""
        size = self.lanes
        while size > _ROWS_OF_LANES:
            size //= 2
            sums = [low + high for low, high in self._halves(sums, size)]
        return sums

    def _halves(self, vectors: list[Value], size: int) -> Iterator[tuple[Value, Value]]:
        """Yield each first `size` of twice as many numbers of two vectors, and each second."""
        low = [at for at in range(2 * self.lanes) if at // size % 2 == 0]
        high = [at + size for at in low]
        for first, second in zip(vectors[::2], vectors[1::2], strict=True):
            yield first.shuffled(low, second), first.shuffled(high, second)

    def in_rows(self, band: Value, totals: list[Value]) -> Iterator[tuple[Value, Value]]:
        size = len(totals) // 2
        for half in (0, 1):
            first = band * RING + 8 * half
            yield from self.rows_of_pass(first, totals[half * size : (half + 1) * size])

    @classmethod
    def multiplier(cls) -> type[Unit]:
        members = {"cpu": cls.cpu, "lanes": cls.lanes}
        return type(f"Stored_{cls.__name__}", (_StoredLevels,), members)

    def decode(self, codes: Pointer, offset: Value, out: Pointer, column: Value) -> None:
        for group, levels in enumerate(self.levels(codes, offset)):
            # Vectors hold all columns for one turn. Halving them ends with four columns in each.
            fours = [[level.bits_as(self.totals) for level in levels]]
            size = self.lanes
            while size > _ROWS_OF_LANES:
                size //= 2
                pairs = [[*zip(*self._halves(vectors, size), strict=True)] for vectors in fours]
                fours = [[*half] for pair in pairs for half in pair]
            first = column + group * self.columns_at_once
            for number, vectors in enumerate(fours):
                for index, rows in enumerate(vectors):
                    out.store(rows, (first + 4 * number) * BAND + index * 4 * self.lanes)


class _StoredLevels(Stored, _LevelBytes):
    """Levels that `Trellis.decode` has stored, of the rows of one pass."""

    def in_rows(self, band: Value, totals: list[Value]) -> Iterator[tuple[Value, Value]]:
        yield from self.rows_of_pass(band // 2 * RING + band % 2 * 8, totals)


class WholeTableTrellis(Trellis):
    """Looks up among all levels at once, as NEON and AVX-512 with VBMI can."""

    def _level_of(self, subsets: Value, planes: Value, first: int) -> Value:
        if self.lanes == 16 and not self.permutes:
            return super()._level_of(subsets, planes, first)
        count = self._table.type.count
        # The bits of an index above a plane's are the next turn's, so one shift serves two turns.
        moved_by = first % 2 if self.permutes and self._planes == 1 else 0
        up = SUBSET_BITS - first + moved_by
        moved = planes << up if up > 0 else planes >> -up
        if self.permutes:
            codes = self._merged(0xF0F, subsets.bits_as(self.words), moved).bits_as(self.bytes)
            of_code = [at % 16 + (at >> 4 + moved_by) % (count // 16) * 16 for at in range(64)]
            return self.permuted(self._table.shuffled(of_code), codes)
        codes = subsets & 0x0F | moved.bits_as(self.bytes) & count - _SUBSETS
        name = f"llvm.aarch64.neon.tbl{count // 16}.v16i8"
        tables = [self._repeated(start, 16) for start in range(0, count, 16)]
        return self.function.call_by_parts(name, self.cpu.operand_bytes, *tables, codes)


class TrellisSet(UnitSet):
    """The units for a trellis, in bytes for any count of tokens."""

    def level_tables(self, levels: torch.Tensor) -> torch.Tensor:
        """Return the table that units read, uint8, of 32 or 64 levels from -63/64 to 63/64."""
        return (levels * Trellis.level_of_one + Trellis.offset).round().to(torch.uint8)


def _trellis(bits: int) -> TrellisSet:
    units = {
        name: on(name, Trellis if name == "avx2" else WholeTableTrellis, bits=bits) for name in CPUS
    }
    return TrellisSet(bits, units, {})


TRELLIS_2 = _trellis(2)
TRELLIS_3 = _trellis(3)
