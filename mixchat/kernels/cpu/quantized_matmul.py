"""x times a matrix of codes of 2 to 8 bits, at the speed at which memory can be read.

The codes of `weights/matrix/` interleave the rows of a band, 32 or in a trellis 64, some columns at
a time. `round_x` rounds x to integers, in the blocks of the weights with a scale
for each. `multiply` adds the products of a block up exactly, and only then scales them as floats.

For NF4 and a few tokens x has 13 bits and a sign. The error against a product in double precision
is about 1.5e-4 of the result. For MXFP4 and more bits x has 15 bits and a sign. The error is 2e-5,
while rounding the weights to 8 bits has cost 6e-3. For many tokens x has 7 bits and a sign
for codes of 4 to 6 bits. The error is 8e-3 for NF4 (1.2e-2 on x86 without VNNI, where levels have
7 bits, too) and 6e-3 for the others, while rounding the weights to 4 bits has cost 9e-2, and to 6
bits 2.4e-2. For a trellis x always has 7 bits and a sign, and rounding the weights has cost 0.14 or
more.

N = tokens, R = rows (out features), C = columns (in features).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from mixchat.kernels.cpu.arithmetic import as_fp32
from mixchat.kernels.cpu.compile import compiled_here, instruction_set
from mixchat.kernels.cpu.emit import Function, Value, f32, i32, i64, vector
from mixchat.kernels.cpu.program import Arguments, Step
from mixchat.kernels.cpu.tile import (
    BLOCKS_AHEAD,
    CODES_AHEAD_BYTES,
    LINE_BYTES,
    SIGNATURE,
    DecodedTile,
    Tile,
    write_decode,
)
from mixchat.kernels.cpu.units import BAND, Unit, UnitSet

# Bands that are read at once for few tokens. Memory was slower with more.
_STREAMS = 2
# Bytes of a stream in one item of work, if each thread still gets enough items.
_STREAM_BYTES = 2**20
_ITEMS = 8
_DECODING = 8  # products that share a stage and decode first, which bounds their memory
_X_BYTES = 2**19  # of x in one item of work, which fit in the second-level cache
_DTYPES = (torch.float32, torch.bfloat16)


class QuantizedMatrix(NamedTuple):
    """A matrix of codes, in the order that `weights/matrix/` describes."""

    codes: torch.Tensor  # of `units.bits` bits
    absmax: torch.Tensor  # flat, one for each block of each row
    levels: torch.Tensor | None  # of `UnitSet.level_tables`; None if codes are numbers themselves
    shape: tuple[int, int]  # R, a multiple of the units' band, and C, of their block
    units: UnitSet
    bias: torch.Tensor | None = None  # fp32 [R]

    @property
    def addresses(self) -> tuple[int, int, int]:
        """Return the addresses of codes, absmax and bias, 0 without one."""
        bias = 0 if self.bias is None else self.bias.data_ptr()
        return self.codes.data_ptr(), self.absmax.data_ptr(), bias


def quantized_matmul(
    x: torch.Tensor, matrix: QuantizedMatrix, *, exact: bool = False
) -> torch.Tensor:
    """Return x [..., C] times the transposed matrix, plus the bias, [..., R] in the type of x.

    On the CPU. Types but fp32 and bf16 are computed as fp32. With codes of 4 to 6 bits
    many rows are rounded more coarsely than few, unless `exact`.
    """
    rows, columns = matrix.shape
    rounded = x if x.dtype in _DTYPES else x.float()
    flat = rounded.reshape(-1, columns).contiguous()
    out = torch.empty(*x.shape[:-1], rows, dtype=flat.dtype)
    for step in quantized_matmul_steps(flat, matrix, out.view(-1, rows), exact=exact):
        step.run()
    return out if out.dtype == x.dtype else out.to(x.dtype)


def quantized_matmul_steps(
    flat: torch.Tensor, matrix: QuantizedMatrix, out: torch.Tensor, *, exact: bool = False
) -> tuple[Step, Step]:
    """Return `quantized_matmul` as steps for contiguous x [N, C], which write `out` [N, R].

    The second one needs the first. `grouped_matmul_steps` says what they keep alive.
    """
    (round_x,), ((multiply,),) = grouped_matmul_steps(flat, [matrix], [out], exact=exact)
    return round_x, multiply


def grouped_matmul_steps(
    flat: torch.Tensor,
    matrices: Sequence[QuantizedMatrix],
    outs: Sequence[torch.Tensor],
    x_rows: torch.Tensor | None = None,
    *,
    exact: bool = False,
    most: int = 1,
) -> tuple[list[Step], list[list[Step]]]:
    """Return steps that round rows of x [N, C], and steps that write each `out` [n, R], by stages.

    Rows of x are in the order of the matrices, as many as each `out` has. Or x has one row, for all
    of them. `x_rows`, int64, choose the rows of x instead. All matrices have the same form. The
    steps do not keep codes, absmax and bias alive, which may be replaced. So may their rows, by up
    to `most` rows of x and `out` that follow one another. If each `out` has one row, they can run
    again. With more rows `slots_taken` has to be set to 0 before.
    """
    shared = x_rows is None and flat.shape[0] == 1
    rounds: list[Step] = []
    products: list[Step] = []
    counts = [out.shape[0] for out in outs]
    assert shared or sum(counts) == (flat if x_rows is None else x_rows).shape[0]
    alone = max(most, *counts) == 1
    units = [_unit(matrices[0], 1 if exact else count, alone) for count in counts]
    first = 0
    for unit, numbers in itertools.groupby(range(len(outs)), key=units.__getitem__):
        group = [*numbers]
        end = first + sum(counts[number] for number in group)
        source = flat if shared or x_rows is not None else flat[first:end]
        chosen = None if x_rows is None else x_rows[first:end]
        most_rows = max(most, *(counts[number] for number in group))
        alike = min(len(group), _DECODING) if unit.decodes and most_rows > 1 else len(group)
        round_x, multiply = _steps(source, chosen, matrices[0], unit, alike, most_rows)
        rounds.append(round_x)
        parts = _RowProducts(multiply)
        row = 0
        for index, number in enumerate(group):
            decoded = index % _DECODING * _decoded_bytes(unit, matrices[0])
            products.append(parts.step(row, matrices[number], outs[number], decoded))
            row += 0 if shared else counts[number]
        first = end
    decodes = any(unit.decodes for unit in units) and max(most, *counts) > 1
    together = _DECODING if decodes else len(products)
    return rounds, [products[at : at + together] for at in range(0, len(products), together)]


class _RowProducts:
    """Products of some rows of the rounded x, as steps of their own."""

    def __init__(self, multiply: Step) -> None:
        self._multiply = multiply
        tokens = multiply.get("tokens") or 1
        x, scales, sums = (multiply.get(name) for name in ("x_integers", "x_scales", "x_sums"))
        self._starts = x, scales, sums
        self._sizes = (scales - x) // tokens, (sums - scales) // tokens  # of a row

    def step(self, row: int, matrix: QuantizedMatrix, out: torch.Tensor, decoded: int) -> Step:
        """Return the step for the rows of x from `row` on, which writes `out` [n, R].

        Its decoded levels lie `decoded` bytes after the first ones.
        """
        codes, absmax, bias = matrix.addresses
        (x, scales, sums), (of_x, of_scales) = self._starts, self._sizes
        whole = self._multiply
        step = whole.copy()
        step.keeps = *whole.keeps, out
        step.set(
            x_integers=x + row * of_x,
            x_scales=scales + row * of_scales,
            x_sums=sums + row * of_scales,
            tokens=out.shape[0],
            out=out.data_ptr(),
            codes=codes,
            absmax=absmax,
            bias=bias,
            decoded=whole.get("decoded") + decoded,
        )
        return step


def _decoded_bytes(unit: type[Unit], matrix: QuantizedMatrix) -> int:
    """Return the bytes for 32 decoded rows of each thread."""
    return matrix.shape[1] * BAND * torch.get_num_threads() if unit.decodes else 0


def _unit(matrix: QuantizedMatrix, tokens: int, alone: bool) -> type[Unit]:
    instructions = instruction_set()
    assert instructions is not None
    return matrix.units.unit_for(instructions, tokens, alone)


def _steps(
    flat: torch.Tensor,
    x_rows: torch.Tensor | None,
    matrix: QuantizedMatrix,
    unit: type[Unit],
    alike: int,
    most: int,
) -> tuple[Step, Step]:
    """Return a step that rounds rows of x, and one that multiplies them with a matrix.

    The second one is to be divided into `alike` steps with up to `most` rows, by `_RowProducts`.
    """
    (rows, columns), units, levels = matrix.shape, matrix.units, matrix.levels
    tokens = flat.shape[0] if x_rows is None else x_rows.shape[0]
    bf16 = flat.dtype == torch.bfloat16
    size = unit.x_type.width // 8
    block = unit.block
    width = unit.multiplier().widths()[0]
    # Enough items for all threads, if `alike` matrices share the stage. Of many small ones each is
    # one item, so that a thread reads on from matrix to matrix.
    items = -(-_ITEMS * torch.get_num_threads() // alike)
    most_bands = rows // unit.band // (_STREAMS * items)
    # Threads may be at different steps of a stage, so each step has its own bytes.
    decoded = _decoded_bytes(unit, matrix) * min(alike, _DECODING) if most > 1 else 0
    # Three allocations would take as long as rounding one token.
    blocks = tokens * columns // block
    scratch = torch.empty(blocks * (8 + block * size) + decoded, dtype=torch.uint8)
    start = scratch.data_ptr()
    compiled = _compiled(unit, bf16, matrix.bias is not None)
    multiply = SIGNATURE.step(
        compiled.function("multiply"),
        x=flat,
        x_rows=x_rows,
        x_integers=scratch,
        x_scales=start + blocks * block * size,
        x_sums=start + blocks * (block * size + 4),
        levels=levels,
        rows=rows,
        columns=columns,
        tokens=tokens,
        chunk=max(width, _X_BYTES * (4 if decoded else 1) // (size * columns) // width * width),
        run=max(1, min(most_bands, _STREAM_BYTES // (columns * unit.band * units.bits // 8))),
        decoded=start + blocks * (8 + block * size),
        slots=torch.get_num_threads(),
    )
    round_x = multiply.copy(compiled.function("round_x" if x_rows is None else "round_chosen"))
    round_x.threads = 1 if tokens == 1 else None
    return round_x, multiply


@compiled_here
def _compiled(module: Any, lanes: int, unit: type[Unit], bf16: bool, biased: bool) -> None:
    for chosen in (False, True):
        _write_round_x(module, unit, bf16, chosen)
    wide = [Tile(module, unit, bf16, biased, _STREAMS, width) for width in unit.wide_widths()]
    if unit.decodes:
        stored = unit.multiplier()
        halves = range(unit.band // BAND)
        tiles = [
            DecodedTile(module, stored, bf16, biased, width, len(halves))
            for width in stored.widths()
        ]
        alone = Tile(module, unit, bf16, biased, 1, 1)
        decodes = [write_decode(module, unit, half) for half in halves]
        _write_multiply(module, unit, wide, alone, _DecodedTokens(tiles, decodes))
    else:
        plain = [Tile(module, unit, bf16, biased, 1, width) for width in unit.widths()]
        _write_multiply(module, unit, wide, plain[-1], _TokenProducts(plain))


def _write_round_x(module: Any, unit: type[Unit], bf16: bool, chosen: bool) -> None:
    """Write `round_x`, or `round_chosen` for the rows of x that `x_rows` names.

    An item of work is a token.
    """
    function = Function(module, "round_chosen" if chosen else "round_x")
    args = SIGNATURE.read_by(function)
    x = args.pointer("x")
    x_integers = args.pointer("x_integers")
    scales = args.pointer("x_scales")
    sums = args.pointer("x_sums")
    columns = args.number("columns")
    lanes = unit.lanes
    blocks = columns // unit.block
    size = unit.x_type.width // 8
    integers = vector(i32, lanes)
    with (
        function.each_item(function.pointer, args.number("tokens")) as token,
        function.loop(0, blocks, 1) as (block, _),
    ):
        first = token * columns + block * unit.block
        row = args.pointer("x_rows").load(i64, token * 8) if chosen else token
        source = row * columns + block * unit.block
        pieces = [as_fp32(x, source + at, bf16, lanes) for at in range(0, unit.block, lanes)]
        # Bits of magnitudes rise like the numbers. NaN comes last, and makes every result NaN.
        bits = [piece.bits_as(integers) & 0x7FFFFFFF for piece in pieces]
        largest = functools.reduce(lambda lhs, rhs: lhs.compare("<", rhs).choose(rhs, lhs), bits)
        name = f"llvm.vector.reduce.umax.v{lanes}i32"
        absmax = function.call(name, i32, largest).bits_as(f32)
        factor = function.constant(f32, unit.largest_x) / absmax
        factor = absmax.compare(">", 1e-30).choose(factor, 0.0)
        scale = absmax * (1 / (unit.largest_x * unit.level_of_one))
        scales.store(scale, (token * blocks + block) * 4)
        total = function.constant(integers, 0)
        for number, piece in enumerate(pieces):
            rounded = function.rounded(piece * factor.broadcast(lanes)).as_integer(integers)
            total = total + rounded
            x_integers.store(unit.arranged(rounded), (first + number * lanes) * size)
        if unit.offset:
            total_of_lanes = function.call(f"llvm.vector.reduce.add.v{lanes}i32", i32, total)
            sums.store(total_of_lanes * -unit.offset, (token * blocks + block) * 4)
    function.finish()


class _TokenProducts:
    """Writes the products of a band with some tokens."""

    def __init__(self, tiles: Sequence[Tile]) -> None:
        self._tiles = tiles  # the last one is for one token

    def may_start(self, args: Arguments) -> Value | None:
        """Return whether a thread takes part, or None if all do."""
        return None

    def write(self, args: Arguments, band: Value, start: Value, end: Value) -> None:
        self._each_tile(args.function, band, start, end, args.number("run"))

    def _each_tile(
        self, function: Function, band: Value, start: Value, end: Value, last: Value
    ) -> None:
        done = start
        for tile in self._tiles:
            turns = (end - done) // tile.tokens * tile.tokens
            with function.loop(done, done + turns, tile.tokens) as (token, _):
                function.call_own(tile.function, function.pointer, band, token, last)
            done = done + turns


class _DecodedTokens(_TokenProducts):
    """Decodes each half of a band once. Each thread has its own slot for that."""

    def __init__(self, tiles: Sequence[Tile], decodes: Sequence[Function]) -> None:
        super().__init__(tiles)
        self._decodes = decodes

    def may_start(self, args: Arguments) -> Value:
        self._slot = args.address("slots_taken").take_next()
        with_slot = self._slot.compare("<", args.number("slots"))
        return args.number("tokens").compare("==", 1) | with_slot

    def write(self, args: Arguments, band: Value, start: Value, end: Value) -> None:
        function = args.function
        slot = self._slot * args.number("columns") * BAND
        for half, decode in enumerate(self._decodes):
            function.call_own(decode, function.pointer, band, slot)
            self._each_tile(function, band * len(self._decodes) + half, start, end, slot)


def _prefetch_start(
    args: Arguments, unit: type[Unit], first: Value, *, second: bool = False
) -> None:
    """Prefetch the first codes and scales of an item of work, which begins at band `first`.

    Tiles prefetch what follows these. An item took 1.3 us more than its bytes without it.
    """
    scales_bytes = BLOCKS_AHEAD * unit.band * unit.scale_bytes
    for stream in range(_STREAMS):
        band = first + args.number("run") * stream
        weights = band * args.number("columns") * unit.band
        codes = args.pointer("codes").plus(weights * unit.bits // 8)
        scales = args.pointer("absmax").plus(weights // unit.block * unit.scale_bytes)
        for start, size in ((scales, scales_bytes), (codes, CODES_AHEAD_BYTES)):
            for line in range(0, size, LINE_BYTES):
                start.prefetch(line, second=second)


def _write_multiply(
    module: Any, unit: type[Unit], wide: Sequence[Tile], alone: Tile, many: _TokenProducts
) -> None:
    """Write `multiply`. An item of work is `_STREAMS` runs of bands and one chunk of tokens.

    `wide` are for one token, for two and so on, and `alone` is for one.
    """
    function = Function(module, "multiply")
    args = SIGNATURE.read_by(function)
    rows, tokens, chunk, run = (args.number(name) for name in ("rows", "tokens", "chunk", "run"))
    bands = rows // unit.band
    size = run * _STREAMS
    groups = (bands + size - 1) // size
    chunks = (tokens + chunk - 1) // chunk
    items = groups * chunks
    may_start = many.may_start(args)
    if may_start is not None:
        items = may_start.choose(items, 0)
    is_one = tokens.compare("==", 1)
    with function.each_item(function.pointer, items) as item:
        start = item // groups * chunk
        end = function.minimum(start + chunk, tokens)
        first = item % groups * size
        last = function.minimum(first + size, bands)
        is_whole = (last - first).compare("==", size)
        _prefetch_start(args, unit, first)
        # Threads mostly take turns, so this is the item that this thread will take next.
        ahead = item + args.number("slots")
        with function.when(ahead.compare("<", groups)):
            _prefetch_start(args, unit, ahead * size, second=True)
        for tile in wide:
            together = is_whole & tokens.compare("==", tile.tokens)
            with function.when(together), function.loop(first, first + run, 1) as (band, _):
                function.call_own(tile.function, function.pointer, band, start, run)
        apart = (is_whole & tokens.compare("<=", len(wide))).compare("==", 0)
        with function.when(apart & is_one), function.loop(first, last, 1) as (band, _):
            function.call_own(alone.function, function.pointer, band, start, run)
        is_many = apart & is_one.compare("==", 0)
        with function.when(is_many), function.loop(first, last, 1) as (band, _):
            many.write(args, band, start, end)
    function.finish()
