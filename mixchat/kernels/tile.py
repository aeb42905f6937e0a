"""The product of some rows of a matrix of codes with some tokens, in the CPU's registers.

A band is 32 rows, or 64 in a trellis, interleaved in the layout "cpu-packed". A block is 64
columns, or 32 in MXFP4, whose weights share a scale (`absmax`) in each row. x has a scale for each
block, too (`x_scales`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from mixchat.kernels.arithmetic import store_fp32
from mixchat.kernels.emit import Function, Pointer, Value, f32, i32, vector
from mixchat.kernels.program import Signature
from mixchat.kernels.trellis_units import Trellis
from mixchat.kernels.units import Unit

_AHEAD = 2  # blocks early, scales are prefetched, which may lie far apart
# Bytes by which codes are prefetched early. The CPU's prefetcher stops at the end of each page.
_CODES_AHEAD = 3072
_LINE = 64  # bytes of a cache line

SIGNATURE = Signature(
    "x",
    "x_rows",
    "x_integers",
    "x_scales",
    "x_sums",
    "codes",
    "absmax",
    "absmax_of_row",
    "absmax_of_block",
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
        self.bands, self.tokens, self._biased = bands, tokens, biased
        self.function = Function(module, f"{type(self).__name__}_{bands}_{tokens}", numbers=3)
        given = self._given = SIGNATURE.read_by(self.function)
        self._units = unit.passes(self.function, given.pointer("levels"))
        self._unit, self._bf16 = self._units[0], bf16
        self._x, self._codes = given.pointer("x_integers"), given.pointer("codes")
        self._absmax, self._out = given.pointer("absmax"), given.pointer("out")
        self._x_scales, self._x_sums = given.pointer("x_scales"), given.pointer("x_sums")
        self._bias = given.pointer("bias")
        self._rows, self._columns = given.number("rows"), given.number("columns")
        self._of_row, self._of_block = map(given.number, ("absmax_of_row", "absmax_of_block"))
        first, self._token, self._apart = self.function.numbers
        self._numbers = [first + self._apart * number for number in range(bands)]
        self._blocks = self._columns // unit.block
        self._bands = [self._codes_of(band) for band in self._numbers]
        self._parts = unit.band // unit.lanes  # vectors for one number of each row of a band
        self._write()

    def _codes_of(self, band: Value) -> Pointer:
        return self._codes.plus(self._bytes_of(band * self._columns))

    def _write(self) -> None:
        function, unit, parts = self.function, self._unit, self._parts
        zeros = [function.constant(vector(f32, unit.lanes), 0.0)] * (
            self.bands * self.tokens * parts
        )
        with function.loop(0, self._blocks, 1, zeros) as (block, totals):
            self._add(block, self._sums(block), totals)
        for place, (band, token) in enumerate(self._pairs()):
            here = totals[place * parts : (place + 1) * parts]
            for row, total in unit.in_rows(self._numbers[band], here):
                if self._biased:
                    total = total + self._bias.load(total.type, row * 4)
                first = (self._token + token) * self._rows + row
                store_fp32(self._out, total, first, self._bf16)
        function.finish()

    def _pairs(self) -> Iterator[tuple[int, int]]:
        """Yield each band with each token, in the order of the sums."""
        return itertools.product(range(self.bands), range(self.tokens))

    def _sums(self, block: Value) -> list[list[Value]]:
        """Return the sums of one block, for each token of each band."""
        passes = [self._sums_of(unit, block) for unit in self._units]
        size = self._unit.sums
        starts = range(0, len(passes[0]), size)
        return [[one for sums in passes for one in sums[start : start + size]] for start in starts]

    def _sums_of(self, unit: Unit, block: Value) -> list[Value]:
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
                            x = self._x_at(token, column + group * unit.columns_at_once)
                            place = (band * self.tokens + token) * unit.sums
                            for part, some in enumerate(levels):
                                sums[place + part] = unit.add_products(sums[place + part], some, x)
        return sums

    def _prefetch(self, column: Value) -> None:
        # The weights of a token would push all else out of the caches, also what Python needs next.
        unit = self._unit
        start = self._bytes_of(column) + _CODES_AHEAD
        for codes in self._bands:
            for line in range(0, unit.unrolled * unit.columns * unit.band * unit.bits // 8, _LINE):
                codes.prefetch(start + line, once=self.tokens == 1)

    def _bytes_of(self, columns: Value) -> Value:
        return columns * (self._unit.band * self._unit.bits // 8)

    def _starts(self, block: Value) -> list[Value]:
        """Return minus what the unit's offset will add to the sums."""
        unit, whole = self._unit, vector(i32, self._unit.lanes)
        if not unit.offset:
            count = self.bands * self.tokens * unit.sums
            return [self.function.constant(whole, 0)] * count
        offsets = [
            unit.start(self._x_sums.load(i32, self._block_of(token, block)))
            for token in range(self.tokens)
        ]
        return [one for one in offsets for _ in range(unit.sums)] * self.bands

    def _x_at(self, token: int, column: Value) -> Value:
        place = (self._token + token) * self._columns + column
        return self._unit.load_x(self._x, place * (self._unit.x_type.width // 8))

    def _block_of(self, token: int, block: Value) -> Value:
        """Return a block's offset in bytes in `x_scales` and `x_sums`."""
        return ((self._token + token) * self._blocks + block) * 4

    def _add(self, block: Value, sums: list[list[Value]], totals: list[Value]) -> None:
        function, unit, parts = self.function, self._unit, self._parts
        floats = vector(f32, unit.lanes)
        x_scales = [
            self._x_scales.load(f32, self._block_of(token, block)).broadcast(unit.lanes)
            for token in range(self.tokens)
        ]
        for band in range(self.bands):
            first_row = self._numbers[band] * unit.band
            here = first_row * self._of_row + block * self._of_block
            further = (here + self._of_block * _AHEAD) * unit.scale_bytes
            self._absmax.prefetch(further, once=self.tokens == 1)
            scales = [unit.scales(self._absmax, here + part * unit.lanes) for part in range(parts)]
            for token in range(self.tokens):
                pair = band * self.tokens + token
                for part, whole in enumerate(unit.in_order(sums[pair])):
                    place = pair * parts + part
                    totals[place] = function.multiply_add(
                        whole.as_float(floats), scales[part] * x_scales[token], totals[place]
                    )


class DecodedTile(Tile):
    """A tile of half a band, whose levels lie in bytes `apart` bytes from `decoded` on."""

    def _codes_of(self, band: Value) -> Pointer:
        return self._given.pointer("decoded").plus(self._apart)


def write_decode(module: Any, unit: type[Trellis], half: int) -> Function:
    """Write a function that decodes half of a band. Its numbers are the band and `apart`."""
    function = Function(module, f"decode_{half}", numbers=2)
    given = SIGNATURE.read_by(function)
    band, apart = function.numbers
    decoder = unit(function, given.pointer("levels"), half)
    columns, out = given.number("columns"), given.pointer("decoded").plus(apart)
    codes, size = given.pointer("codes"), unit.band * unit.bits // 8  # bytes of a column
    with function.loop(0, columns, unit.columns) as (column, _):
        decoder.decode(codes, (band * columns + column) * size, out, column)
    function.finish()
    return function
