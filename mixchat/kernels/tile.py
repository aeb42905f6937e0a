"""The product of some rows of a matrix of codes with some tokens, in the CPU's registers.

A band is 32 rows, interleaved in the layout "cpu-packed". A block is 64 columns, or 32 in MXFP4,
whose weights share a scale (`absmax`) in each row. x has a scale for each block, too (`x_scales`).
"""

from __future__ import annotations

from typing import Any

from mixchat.kernels.arithmetic import store_fp32
from mixchat.kernels.emit import Function, Value, f32, i32, vector
from mixchat.kernels.program import Signature
from mixchat.kernels.units import Unit

BAND = 32  # rows
_AHEAD = 4  # blocks early, scales are prefetched, which lie far apart
# Bytes by which codes are prefetched early. The CPU's prefetcher stops at the end of each page.
_CODES_AHEAD = 3072
_LINE = 64  # bytes of a cache line

SIGNATURE = Signature(
    "x",
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
        self.function = Function(module, f"tile_{bands}_{tokens}", numbers=3)
        given = SIGNATURE.read_by(self.function)
        self._unit, self._bf16 = unit(self.function, given.pointer("levels")), bf16
        self._x, self._codes = given.pointer("x_integers"), given.pointer("codes")
        self._absmax, self._out = given.pointer("absmax"), given.pointer("out")
        self._x_scales, self._x_sums = given.pointer("x_scales"), given.pointer("x_sums")
        self._bias = given.pointer("bias")
        self._rows, self._columns = given.number("rows"), given.number("columns")
        band, self._token, apart = self.function.numbers
        self._rows_of_bands = [(band + apart * number) * BAND for number in range(bands)]
        self._blocks = self._columns // unit.block
        self._bands = [
            self._codes.plus(self._bytes_of((band + apart * number) * self._columns))
            for number in range(bands)
        ]
        self._parts = BAND // unit.lanes  # vectors for one number of each row of a band
        self._write()

    def _write(self) -> None:
        function, lanes, parts = self.function, self._unit.lanes, self._parts
        zeros = [function.constant(vector(f32, lanes), 0.0)] * (self.bands * self.tokens * parts)
        with function.loop(0, self._blocks, 1, zeros) as (block, totals):
            self._add(block, self._sums(block), totals)
        for place, total in enumerate(totals):
            band, token, part = self._split(place)
            row = self._rows_of_bands[band] + part * lanes
            if self._biased:
                total = total + self._bias.load(total.type, row * 4)
            first = (self._token + token) * self._rows + row
            store_fp32(self._out, total, first, self._bf16)
        function.finish()

    def _split(self, place: int) -> tuple[int, int, int]:
        """Return band, token and part of a place in the sums."""
        tokens, parts = self.tokens, self._parts
        return place // (tokens * parts), place // parts % tokens, place % parts

    def _sums(self, block: Value) -> list[Value]:
        """Return the sums of one block, in the unit's order of the rows."""
        unit, parts = self._unit, self._parts
        starts = self._starts(block)
        steps = unit.block // unit.columns
        with self.function.loop(0, steps, unit.unrolled, starts) as (first_step, sums):
            self._prefetch(block * unit.block + first_step * unit.columns)
            for unrolled in range(unit.unrolled):
                column = block * unit.block + (first_step + unrolled) * unit.columns
                at_once = 32 // unit.x_type.width
                for band, codes in enumerate(self._bands):
                    groups = unit.levels(codes, self._bytes_of(column))
                    for group, levels in enumerate(groups):
                        for token in range(self.tokens):
                            x = self._x_at(token, column + group * at_once)
                            place = (band * self.tokens + token) * parts
                            for part, some in enumerate(levels):
                                sums[place + part] = unit.add_products(sums[place + part], some, x)
        return sums

    def _prefetch(self, column: Value) -> None:
        unit = self._unit
        start = self._bytes_of(column) + _CODES_AHEAD
        for codes in self._bands:
            for line in range(0, unit.unrolled * unit.columns * BAND * unit.bits // 8, _LINE):
                codes.prefetch(start + line)

    def _bytes_of(self, columns: Value) -> Value:
        return columns * (BAND * self._unit.bits // 8)

    def _starts(self, block: Value) -> list[Value]:
        """Return minus what the unit's offset will add to the sums."""
        unit, whole = self._unit, vector(i32, self._unit.lanes)
        if not unit.offset:
            count = self.bands * self.tokens * self._parts
            return [self.function.constant(whole, 0)] * count
        offsets = [
            self._x_sums.load(i32, self._block_of(token, block)).broadcast(unit.lanes)
            for token in range(self.tokens)
        ]
        return [one for one in offsets for _ in range(self._parts)] * self.bands

    def _x_at(self, token: int, column: Value) -> Value:
        place = (self._token + token) * self._columns + column
        return self._x.load(i32, place * (self._unit.x_type.width // 8))

    def _block_of(self, token: int, block: Value) -> Value:
        """Return a block's offset in bytes in `x_scales` and `x_sums`."""
        return ((self._token + token) * self._blocks + block) * 4

    def _add(self, block: Value, sums: list[Value], totals: list[Value]) -> None:
        function, unit, parts = self.function, self._unit, self._parts
        floats = vector(f32, unit.lanes)
        x_scales = [
            self._x_scales.load(f32, self._block_of(token, block)).broadcast(unit.lanes)
            for token in range(self.tokens)
        ]
        for band in range(self.bands):
            here = block * self._rows + self._rows_of_bands[band]
            self._absmax.prefetch((here + self._rows * _AHEAD) * unit.scale_bytes)
            scales = [unit.scales(self._absmax, here + part * unit.lanes) for part in range(parts)]
            for token in range(self.tokens):
                place = (band * self.tokens + token) * parts
                in_order = unit.in_order(sums[place : place + parts])
                for part, whole in enumerate(in_order):
                    totals[place + part] = function.multiply_add(
                        whole.as_float(floats), scales[part] * x_scales[token], totals[place + part]
                    )
