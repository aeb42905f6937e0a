"""The product of some rows of a matrix of codes with some tokens, in the CPU's registers.

A band is 32 rows, or 64 in a trellis, whose codes are interleaved. A block is 64 columns, or 32 in
MXFP4, whose weights share a scale (`absmax`) in each row. x has a scale for each block, too
(`x_scales`).
"""

from __future__ import annotations

from itertools import product
from typing import Any

from mixchat.kernels.cpu.arithmetic import store_fp32
from mixchat.kernels.cpu.emit import Function, Pointer, Value, f32, i32, vector
from mixchat.kernels.cpu.program import Signature
from mixchat.kernels.cpu.units import ByteUnit, Unit

BLOCKS_AHEAD = 4  # blocks by which scales are prefetched early
# Bytes by which codes are prefetched early. The CPU's prefetcher stops at the end of each page.
CODES_AHEAD_BYTES = 3072
LINE_BYTES = 64  # bytes of a cache line

SIGNATURE = Signature(
    "x",
    "x_rows",
    "x_integers",
    "x_scales",
    "x_sums",
    "codes",
    "absmax",
    "levels",
    "out",
    "rows",
    "columns",
    "tokens",
    "chunk",
    "run",
    "bias",
    "decoded",
    "slots",
    "slots_taken",
)


class Tile:
    """A function for the product of some bands with some tokens, whose sums fit in registers.

    In each block products of integers are added up, without rounding, and scaled. The function's
    numbers are the first band, the first token, and how many bands the bands lie apart. `biased`
    products get one number more for each row.
    """

    def __init__(
        self, module: Any, unit: type[Unit], bf16: bool, biased: bool, bands: int, tokens: int
    ) -> None:
        self.bands = bands
        self.tokens = tokens
        self._biased = biased
        self.function = Function(module, f"{type(self).__name__}_{bands}_{tokens}", numbers=3)
        args = self._args = SIGNATURE.read_by(self.function)
        self._units = unit.passes(self.function, args.pointer("levels"))
        self._unit = self._units[0]
        self._bf16 = bf16
        self._x = args.pointer("x_integers")
        self._codes = args.pointer("codes")
        self._absmax = args.pointer("absmax")
        self._out = args.pointer("out")
        self._x_scales = args.pointer("x_scales")
        self._x_sums = args.pointer("x_sums")
        self._bias = args.pointer("bias")
        self._rows = args.number("rows")
        self._columns = args.number("columns")
        first, self._token, self._apart = self.function.numbers
        self._numbers = [first + self._apart * number for number in range(bands)]
        self._blocks = self._columns // unit.block
        self._bands = [self._codes_of(band) for band in self._numbers]
        self._parts = unit.band // unit.lanes  # vectors for one number of each row of a band
        self._write()

    def _codes_of(self, band: Value) -> Pointer:
        return self._codes.plus(self._bytes_of(band * self._columns))

    def _write(self) -> None:
        function = self.function
        unit = self._unit
        parts = self._parts
        zeros = [function.constant(vector(f32, unit.lanes), 0.0)] * (
            self.bands * self.tokens * parts
        )
        with function.loop(0, self._blocks, 1, zeros) as (block, totals):
            self._add(block, self._sums(block), totals)
        for pair, (band, token) in enumerate(product(range(self.bands), range(self.tokens))):
            of_pair = totals[pair * parts : (pair + 1) * parts]
            for row, total in unit.in_rows(self._numbers[band], of_pair):
                if self._biased:
                    total = total + self._bias.load(total.type, row * 4)
                first = (self._token + token) * self._rows + row
                store_fp32(self._out, total, first, self._bf16)
        function.finish()

    def _sums(self, block: Value) -> list[list[Value]]:
        """Return the sums of one block, for each token of each band."""
        passes = []
        for unit in self._units:
            starts = self._starts(block)
            steps = unit.block // unit.columns
            with self.function.loop(0, steps, unit.unrolled, starts) as (first_step, sums):
                self._prefetch(block * unit.block + first_step * unit.columns)
                for unrolled in range(unit.unrolled):
                    column = block * unit.block + (first_step + unrolled) * unit.columns
                    for band, codes in enumerate(self._bands):
                        groups = unit.levels(codes, self._bytes_of(column))
                        for group, levels in enumerate(groups):
                            for token in range(self.tokens):
                                x_column = column + group * unit.columns_at_once
                                x_index = (self._token + token) * self._columns + x_column
                                offset = x_index * (unit.x_type.width // 8)
                                first = (band * self.tokens + token) * unit.sums
                                own = slice(first, first + unit.sums)
                                sums[own] = unit.add(sums[own], levels, self._x, offset)
            passes.append(sums)
        size = self._unit.sums
        pairs = range(0, len(passes[0]), size)
        return [[total for sums in passes for total in sums[pair : pair + size]] for pair in pairs]

    def _prefetch(self, column: Value) -> None:
        unit = self._unit
        start = self._bytes_of(column) + CODES_AHEAD_BYTES
        size = unit.unrolled * unit.columns * unit.band * unit.bits // 8
        for codes in self._bands:
            for line in range(0, size, LINE_BYTES):
                codes.prefetch(start + line)

    def _bytes_of(self, columns: Value) -> Value:
        return columns * (self._unit.band * self._unit.bits // 8)

    def _starts(self, block: Value) -> list[Value]:
        """Return minus what the unit's offset will add to the sums, by which a block starts."""
        unit = self._unit
        if not unit.offset:
            zero = self.function.constant(vector(i32, unit.lanes), 0)
            return [zero] * (self.bands * self.tokens * unit.sums)
        totals = [
            self._x_sums.load(i32, self._block_of(token, block)) for token in range(self.tokens)
        ]
        return [start for total in totals for start in unit.starts_of(total)] * self.bands

    def _block_of(self, token: int, block: Value) -> Value:
        """Return a block's offset in bytes in `x_scales` and `x_sums`."""
        return ((self._token + token) * self._blocks + block) * 4

    def _first_scale(self, band: Value, block: Value) -> Value:
        """Return the number of the first scale in a block of a band."""
        return (band * self._blocks + block) * self._unit.band

    def _add(self, block: Value, sums: list[list[Value]], totals: list[Value]) -> None:
        function = self.function
        unit = self._unit
        parts = self._parts
        floats = vector(f32, unit.lanes)
        x_scales = [
            self._x_scales.load(f32, self._block_of(token, block)).broadcast(unit.lanes)
            for token in range(self.tokens)
        ]
        for band, number_of_band in enumerate(self._numbers):
            first = self._first_scale(number_of_band, block)
            # After the last block comes the band that is probably next.
            ahead = self._first_scale(number_of_band, block + BLOCKS_AHEAD)
            self._absmax.prefetch(ahead * unit.scale_bytes)
            scales = [
                unit.scales(self._absmax, first + number * unit.lanes) for number in range(parts)
            ]
            for token in range(self.tokens):
                pair = band * self.tokens + token
                for number, integers in enumerate(unit.in_order(sums[pair])):
                    index = pair * parts + number
                    totals[index] = function.multiply_add(
                        integers.as_float(floats), scales[number] * x_scales[token], totals[index]
                    )


class DecodedTile(Tile):
    """A tile of half a band or of a whole one, 32 rows. Its levels are bytes, `apart` bytes on."""

    def __init__(
        self, module: Any, unit: type[Unit], bf16: bool, biased: bool, tokens: int, halves: int
    ) -> None:
        self._halves = halves  # of a band of codes
        super().__init__(module, unit, bf16, biased, 1, tokens)

    def _codes_of(self, band: Value) -> Pointer:
        return self._args.pointer("decoded").plus(self._apart)

    def _prefetch(self, column: Value) -> None:
        """Leave stored levels to the caches."""

    def _first_scale(self, band: Value, block: Value) -> Value:
        halves = self._halves
        first = band // halves * self._blocks + block
        return (first * halves + band % halves) * self._unit.band


def write_decode(module: Any, unit: type[Unit], half: int) -> Function:
    """Write a function that decodes 32 rows of a band. Its numbers are the band and `apart`."""
    function = Function(module, f"decode_{half}", numbers=2)
    args = SIGNATURE.read_by(function)
    band, apart = function.numbers
    decoder = unit.passes(function, args.pointer("levels"))[half]
    assert isinstance(decoder, ByteUnit)
    columns = args.number("columns")
    out = args.pointer("decoded").plus(apart)
    codes, size = args.pointer("codes"), unit.band * unit.bits // 8  # bytes of a column
    with function.loop(0, columns, unit.columns) as (column, _):
        decoder.decode(codes, (band * columns + column) * size, out, column)
    function.finish()
    return function
