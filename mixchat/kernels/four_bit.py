"""x times a matrix of 4-bit codes, at the speed at which memory can be read.

The codes are read in the layout "cpu-packed" of `weights/nf4.py`: 32 rows, a band, lie interleaved,
pair of columns by pair of columns. A code is looked up as a whole number of 12 bits and a sign, and
x is rounded to one of 13 bits and a sign, 64 columns at a time with a scale of their own. Both
products of a pair are then one instruction of the CPU, and the sum over 64 columns is exact:

    8191 * 4095 * 64 = 2,146,697,280 < 2^31

Only then it becomes a float and is multiplied with both scales. Against a product in double
precision the error is about 1.5e-4 of the result, an eighth of what rounding the 16 levels to bf16
costs.

N = tokens, R = rows (out features), C = columns (in features), B = C / 64 blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from llvmlite import ir

from mixchat.kernels.arithmetic import rounded_to_bf16
from mixchat.kernels.compile import Compiled, InstructionSet, compile_module, instruction_set
from mixchat.kernels.emit import Function, Pointer, Value, f32, i8, i16, i32, vector
from mixchat.kernels.signature import Signature

BAND = 32  # rows
BLOCK = 64  # columns
_LINE = BAND  # bytes: a pair of columns of a band
_LARGEST_X = 8191
_LARGEST_LEVEL = 4095
_BANDS = 4  # of one item of work where there is one token: as many streams from memory
_AHEAD = 8  # blocks: how early their scales, which lie far apart, are asked for
_X_BYTES = 2**19  # of x at a time, for the second-level cache to hold them
# Tokens whose products are added up at once, most first: as many as the CPU has registers for.
_WIDTHS: dict[InstructionSet, tuple[int, ...]] = {"avx512": (8, 4, 2, 1), "avx2": (4, 2, 1)}
_LANES: dict[InstructionSet, int] = {"avx512": 16, "avx2": 8}
_UNROLLED: dict[InstructionSet, int] = {"avx512": 4, "avx2": 2}  # lines
_DTYPES = (torch.float32, torch.bfloat16)

_SIGNATURE = Signature(
    "x",
    "whole_x",
    "x_scales",
    "codes",
    "absmax",
    "levels",
    "out",
    "rows",
    "columns",
    "tokens",
    "chunk",
)


def available() -> bool:
    """Whether this CPU can run it: it takes AVX2."""
    return instruction_set() is not None


def whole_levels(levels: torch.Tensor) -> torch.Tensor:
    """The 16 levels (fp32, -1 to 1) as `matmul` wants them: int16 [16]."""
    return (levels * _LARGEST_LEVEL).round().to(torch.int16)


def matmul(
    x: torch.Tensor,
    codes: torch.Tensor,
    absmax: torch.Tensor,
    levels: torch.Tensor,
    shape: tuple[int, int],
) -> torch.Tensor:
    """x [..., C] times the transposed matrix of `shape` [R, C]: [..., R] in the type of x.

    codes: uint8 [R * C / 2] and absmax: bf16 [C / 64 * R], layout "cpu-packed"; levels: what
    `whole_levels` gave. x: fp32 or bf16 (others are computed as fp32), on the CPU. R is a multiple
    of 32, C of 64. Each row of x is computed by itself: its result does not depend on the others.
    """
    rows, columns = shape
    dtype = x.dtype if x.dtype in _DTYPES else torch.float32
    flat = x.reshape(-1, columns).to(dtype).contiguous()
    tokens = flat.shape[0]
    whole_x = torch.empty(tokens, columns, dtype=torch.int16)
    x_scales = torch.empty(tokens, columns // BLOCK)
    out = torch.empty(tokens, rows, dtype=dtype)
    numbers = _SIGNATURE.numbers(
        x=flat.data_ptr(),
        whole_x=whole_x.data_ptr(),
        x_scales=x_scales.data_ptr(),
        codes=codes.data_ptr(),
        absmax=absmax.data_ptr(),
        levels=levels.data_ptr(),
        out=out.data_ptr(),
        rows=rows,
        columns=columns,
        tokens=tokens,
        chunk=max(8, _X_BYTES // (2 * columns)),
    )
    compiled = _compiled(instruction_set(), dtype == torch.bfloat16)
    threads = torch.get_num_threads()
    compiled.function("round_x").run(numbers, 1 if tokens == 1 else threads)
    numbers[0] = 0
    compiled.function("multiply").run(numbers, threads)
    return out.view(*x.shape[:-1], rows).to(x.dtype)


@functools.cache
def _compiled(instructions: InstructionSet | None, half: bool) -> Compiled:
    """Both functions for x in fp32, or bf16 (`half`)."""
    assert instructions is not None
    module = ir.Module("four_bit")
    _write_round_x(module, _LANES[instructions], half)
    wide = _Tile(module, instructions, half, _BANDS, 1)
    tiles = [_Tile(module, instructions, half, 1, width) for width in _WIDTHS[instructions]]
    _write_multiply(module, wide, tiles)
    return compile_module(module, instructions)


def _write_round_x(module: Any, lanes: int, half: bool) -> None:
    """x as whole numbers, and a scale for each block: a token is an item of work."""
    function = Function(module, "round_x")
    given = _SIGNATURE.read_by(function)
    x, whole_x, scales = (given.pointer(name) for name in ("x", "whole_x", "x_scales"))
    columns, tokens = given.number("columns"), given.number("tokens")
    blocks = columns // BLOCK
    size = 2 if half else 4
    with function.each_item(function.pointer, tokens) as token:  # noqa: SIM117
        with function.loop(0, blocks, 1) as (block, _):
            first = token * columns + block * BLOCK
            pieces = [
                _floats(x, (first + start) * size, lanes, half) for start in range(0, BLOCK, lanes)
            ]
            # Of numbers without their sign, the bits are in the order of the numbers; NaN comes
            # last, so that it gets into the scale and from there into every result.
            largest = None
            for piece in pieces:
                bits = piece.bits_as(vector(i32, lanes)) & 0x7FFFFFFF
                largest = (
                    bits if largest is None else bits.compare("<", largest).choose(largest, bits)
                )
            assert largest is not None
            top = function.call(f"llvm.vector.reduce.umax.v{lanes}i32", i32, largest)
            absmax = top.bits_as(f32)
            factor = absmax.compare(">", 1e-30).choose(
                function.constant(f32, _LARGEST_X) / absmax, 0.0
            )
            scales.store(absmax * (1 / (_LARGEST_X * _LARGEST_LEVEL)), (token * blocks + block) * 4)
            for place, piece in enumerate(pieces):
                scaled = piece * factor.spread(lanes)
                rounded = function.call(f"llvm.rint.v{lanes}f32", scaled.type, scaled)
                whole = rounded.as_whole(vector(i32, lanes)).narrowed(vector(i16, lanes))
                whole_x.store(whole, (first + place * lanes) * 2)
    function.finish()


def _floats(pointer: Pointer, offset: Value, count: int, half: bool) -> Value:
    """So many bf16 or fp32 numbers as fp32."""
    if not half:
        return pointer.load(vector(f32, count), offset)
    bits = pointer.load(vector(i16, count), offset).widened(vector(i32, count)) << 16
    return bits.bits_as(vector(f32, count))


def _write_multiply(module: Any, wide: _Tile, tiles: Sequence[_Tile]) -> None:
    """The product: an item of work is `_BANDS` bands for one chunk of tokens."""
    function = Function(module, "multiply")
    given = _SIGNATURE.read_by(function)
    rows, tokens, chunk = (given.number(name) for name in ("rows", "tokens", "chunk"))
    bands = rows // BAND
    groups = (bands + (_BANDS - 1)) // _BANDS
    chunks = (tokens + chunk - 1) // chunk
    with function.each_item(function.pointer, groups * chunks) as item:
        start = item // groups * chunk
        end = _smaller(start + chunk, tokens)
        first = item % groups * _BANDS
        last = _smaller(first + _BANDS, bands)
        together = tokens.compare("==", 1) & (last - first).compare("==", _BANDS)
        with function.when(together):
            function.call_own(wide.function, function.pointer, first, start)
        with (
            function.when(together.compare("==", 0)),
            function.loop(first, last, 1) as (band, _),
        ):
            done = start
            for tile in tiles:
                turns = (end - done) // tile.tokens * tile.tokens
                with function.loop(done, done + turns, tile.tokens) as (token, _):
                    function.call_own(tile.function, function.pointer, band, token)
                done = done + turns
    function.finish()


def _smaller(one: Value, other: Value) -> Value:
    return one.compare("<", other).choose(one, other)


class _Tile:
    """The product of `bands` bands with `tokens` tokens: as much as the registers hold the sums of.

    For each block the products are added up as whole numbers, then once as floats.
    """

    def __init__(
        self, module: Any, instructions: InstructionSet, half: bool, bands: int, tokens: int
    ) -> None:
        self.bands, self.tokens = bands, tokens
        self.function = Function(module, f"tile_{bands}_{tokens}", numbers=2)
        self._lanes, self._half = _LANES[instructions], half
        self._unrolled = _UNROLLED[instructions]
        given = _SIGNATURE.read_by(self.function)
        self._lookup = _lookup(instructions, self.function, given.pointer("levels"))
        self._x, self._codes = given.pointer("whole_x"), given.pointer("codes")
        self._absmax, self._x_scales = given.pointer("absmax"), given.pointer("x_scales")
        self._out = given.pointer("out")
        self._rows, self._columns = given.number("rows"), given.number("columns")
        band, self._token = self.function.numbers
        self._row = band * BAND
        self._blocks = self._columns // BLOCK
        self._bands = [
            self._codes.plus((band + number) * self._columns * (BAND // 2))
            for number in range(bands)
        ]
        self._write()

    def _write(self) -> None:
        function, lanes = self.function, self._lanes
        parts = BAND // lanes  # vectors that hold a number for each row of a band
        zeros = [function.constant(vector(f32, lanes), 0.0)] * (self.bands * self.tokens * parts)
        with function.loop(0, self._blocks, 1, zeros) as (block, totals):
            sums = self._sums(block, parts)
            self._add(block, sums, totals, parts)
        for place, total in enumerate(totals):
            band, token, part = _split(place, self.tokens, parts)
            first = (self._token + token) * self._rows + self._row + band * BAND + part * lanes
            if self._half:
                self._out.store(rounded_to_bf16(total), first * 2)
            else:
                self._out.store(total, first * 4)
        function.finish()

    def _sums(self, block: Value, parts: int) -> list[Value]:
        """The sums of one block's products, in the order in which `_lookup` gives the rows."""
        function, lanes = self.function, self._lanes
        count = self.bands * self.tokens * parts
        zeros = [function.constant(vector(i32, lanes), 0)] * count
        with function.loop(0, BLOCK // 2, self._unrolled, zeros) as (line, sums):
            for step in range(self._unrolled):
                pair = block * (BLOCK // 2) + line + step  # of columns
                pairs = [
                    self._x.load(i32, ((self._token + token) * self._columns + pair * 2) * 2)
                    .spread(lanes)
                    .bits_as(vector(i16, 2 * lanes))
                    for token in range(self.tokens)
                ]
                for band, codes in enumerate(self._bands):
                    levels = self._lookup.levels(codes.load(vector(i8, _LINE), pair * _LINE))
                    for token, x in enumerate(pairs):
                        for part, level in enumerate(levels):
                            place = (band * self.tokens + token) * parts + part
                            sums[place] = sums[place] + self._lookup.products(level, x)
        return sums

    def _add(self, block: Value, sums: list[Value], totals: list[Value], parts: int) -> None:
        function, lanes = self.function, self._lanes
        floats = vector(f32, lanes)
        x_scales = [
            self._x_scales.load(f32, ((self._token + token) * self._blocks + block) * 4)
            for token in range(self.tokens)
        ]
        for band in range(self.bands):
            here = (block * self._rows + self._row + band * BAND) * 2
            self._absmax.prefetch(here + self._rows * (_AHEAD * 2))
            for token in range(self.tokens):
                place = (band * self.tokens + token) * parts
                in_order = self._lookup.in_order(sums[place : place + parts])
                for part, whole in enumerate(in_order):
                    scale = _floats(self._absmax, here + part * lanes * 2, lanes, half=True)
                    totals[place + part] = function.call(
                        f"llvm.fma.v{lanes}f32",
                        floats,
                        whole.as_float(floats),
                        scale * x_scales[token].spread(lanes),
                        totals[place + part],
                    )


def _split(place: int, tokens: int, parts: int) -> tuple[int, int, int]:
    """Band, token and part of a place in the list of sums."""
    return place // (tokens * parts), place // parts % tokens, place % parts


class _Avx512:
    """One instruction looks 32 codes up. It reads 5 bits: the table is there twice."""

    def __init__(self, function: Function, table: Pointer) -> None:
        self._function, self._words = function, vector(i16, 32)
        self._table = table.load(vector(i16, 16)).picked([*range(16), *range(16)])

    def levels(self, line: Value) -> list[Value]:
        """Levels of rows 0 to 15, and 16 to 31, as pairs."""
        words = line.widened(self._words)
        return [
            self._function.call("llvm.x86.avx512.permvar.hi.512", self._words, self._table, places)
            for places in (words, words >> 4)
        ]

    def products(self, levels: Value, x: Value) -> Value:
        """Of each pair the sum of both products."""
        return self._function.call("llvm.x86.avx512.pmaddw.d.512", vector(i32, 16), levels, x)

    def in_order(self, sums: list[Value]) -> list[Value]:
        """The sums in the order of the rows."""
        return sums


class _Avx2:
    """Looks up bytes: the low and the high ones of the levels, then puts them together."""

    def __init__(self, function: Function, table: Pointer) -> None:
        self._function, self._bytes, self._words = function, vector(i8, 32), vector(i16, 16)
        both = table.load(self._bytes)
        self._low, self._high = (both.picked(2 * [*range(odd, 32, 2)]) for odd in (0, 1))

    def levels(self, line: Value) -> list[Value]:
        """Levels of rows 0-3 and 8-11, 4-7 and 12-15, and the same from row 16, as pairs."""
        shifted = (line.bits_as(self._words) >> 4).bits_as(self._bytes)
        found = []
        for places in (line & 0xF, shifted & 0xF):
            low, high = (
                self._function.call("llvm.x86.avx2.pshuf.b", self._bytes, table, places)
                for table in (self._low, self._high)
            )
            for start in (0, 8):  # within each half of the vector, as the instruction does it
                where = [*range(start, start + 8), *range(start + 16, start + 24)]
                mixed = low.picked([place + 32 * odd for place in where for odd in (0, 1)], high)
                found.append(mixed.bits_as(self._words))
        return found

    def products(self, levels: Value, x: Value) -> Value:
        """Of each pair the sum of both products."""
        return self._function.call("llvm.x86.avx2.pmadd.wd", vector(i32, 8), levels, x)

    def in_order(self, sums: list[Value]) -> list[Value]:
        """The sums in the order of the rows."""
        lower, upper = [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]
        return [
            one.picked(half, other)
            for one, other in (sums[:2], sums[2:])
            for half in (lower, upper)
        ]


def _lookup(instructions: InstructionSet, function: Function, table: Pointer) -> _Avx512 | _Avx2:
    return (_Avx512 if instructions == "avx512" else _Avx2)(function, table)
