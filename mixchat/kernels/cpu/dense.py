"""x times a dense matrix, by torch or by a kernel that computes each row of x by itself.

In the kernel each number of the result is the sum of a vector of fp32 numbers, to which products
are added from the first column to the last. So its bits depend on no other rows or threads.

N = tokens, R = rows (out features), C = columns (in features).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from mixchat.kernels.cpu import rows
from mixchat.kernels.cpu.arithmetic import as_fp32, reduced, store_fp32
from mixchat.kernels.cpu.compile import compiled_here, multiplies_bf16
from mixchat.kernels.cpu.emit import Function, f32, vector
from mixchat.kernels.cpu.program import Signature, Step

_MANY = 32  # tokens from which on widening the weights to fp32 pays
_WIDENED = 2**23  # weights that are widened at once
_GROUP = 32  # rows of one item of work
_X_BYTES = 2**18  # of x in one item of work, which fit in the second-level cache
# Bytes by which weights are prefetched early. The CPU's prefetcher stops at the end of each page.
_AHEAD = 1024
_SIGNATURE = Signature("x", "weight", "out", "rows", "columns", "tokens", "chunk")


def dense_matmul(x: torch.Tensor, weight: torch.Tensor, *, exact: bool = False) -> torch.Tensor:
    """Return x [..., C] times the transposed weight [R, C], the fastest way there is.

    With `exact`, each row of x has the bits that it has alone, if the kernel takes it.
    """
    tokens = x.shape[:-1].numel()
    columns = weight.shape[1]
    alike = x.dtype == weight.dtype and x.shape[-1] == columns
    if (exact or tokens == 1) and alike and rows.can_compute(x.dtype, columns, x.device.type):
        return exact_matmul(x, weight)
    if x.device.type != "cpu" or x.dtype == torch.float32:
        return functional.linear(x, weight)
    # oneDNN is half as fast for one token in bf16 with AVX512-BF16. `torch.backends.mkldnn.flags`,
    # which would switch it off, warns about GPUs.
    if tokens == 1:
        was_enabled = torch._C._get_mkldnn_enabled()
        torch._C._set_mkldnn_enabled(False)
        try:
            return functional.linear(x, weight)
        finally:
            torch._C._set_mkldnn_enabled(was_enabled)
    # Hardly any CPU has instructions for fp16. Without them fp32 is up to four times as fast.
    if tokens >= _MANY and (x.dtype == torch.float16 or not multiplies_bf16()):
        wide = x.float()
        height = max(1, _WIDENED // columns)
        pieces = (functional.linear(wide, piece.float()) for piece in torch.split(weight, height))
        return torch.cat([piece.to(x.dtype) for piece in pieces], dim=-1)
    return functional.linear(x, weight)


def exact_matmul(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return x [..., C] times the transposed weight [R, C], each row of x by itself.

    fp32 or bf16, added up in fp32.
    """
    height, columns = weight.shape
    out = torch.empty(*x.shape[:-1], height, dtype=x.dtype)
    flat = x.reshape(-1, columns).contiguous()
    matmul_step(flat, weight.contiguous(), out.view(-1, height)).run()
    return out


def matmul_step(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> Step:
    """Return `exact_matmul` as a step, from x [N, C] to `out` [N, R]. All are contiguous."""
    height, columns = weight.shape
    return _SIGNATURE.step(
        _compiled(x.dtype == torch.bfloat16).function("multiply"),
        x=x,
        weight=weight,
        out=out,
        rows=height,
        columns=columns,
        tokens=x.shape[0],
        chunk=max(8, _X_BYTES // (x.element_size() * columns)),
    )


@compiled_here
def _compiled(module: Any, lanes: int, bf16: bool) -> None:
    # Rows and tokens that are computed at once, the most first, as registers allow.
    heights, widths = ((8, 1), (3, 1)) if lanes == 16 else ((4, 1), (2, 1))
    tiles = [[_DenseTile(module, lanes, bf16, rows, width) for width in widths] for rows in heights]
    _write_multiply(module, tiles)


class _DenseTile:
    """The product of some rows with some tokens, in registers."""

    def __init__(self, module: Any, lanes: int, bf16: bool, rows: int, tokens: int) -> None:
        self.rows = rows
        self.tokens = tokens
        self._lanes = lanes
        self._bf16 = bf16
        self.function = Function(module, f"tile_{rows}_{tokens}", numbers=2)
        self._write()

    def _write(self) -> None:
        function = self.function
        args = _SIGNATURE.read_by(self.function)
        x = args.pointer("x")
        weight = args.pointer("weight")
        columns, (row, token) = args.number("columns"), function.numbers
        zero = function.constant(vector(f32, self._lanes), 0.0)
        size = 2 if self._bf16 else 4
        zeros = [zero] * (self.rows * self.tokens)
        with function.loop(0, columns, self._lanes, zeros) as (column, sums):
            numbers = [
                as_fp32(x, (token + number) * columns + column, self._bf16, self._lanes)
                for number in range(self.tokens)
            ]
            ahead = column + _AHEAD // size
            # After the end of a row comes this tile's next row, which is being read already.
            next_tile = ahead + columns * (self.rows - 1)
            ahead = ahead.compare("<", columns).choose(ahead, next_tile)
            for number in range(self.rows):
                position = (row + number) * columns + column
                weight.prefetch(((row + number) * columns + ahead) * size)
                factors = as_fp32(weight, position, self._bf16, self._lanes)
                for index, x_numbers in enumerate(numbers, number * self.tokens):
                    sums[index] = function.multiply_add(factors, x_numbers, sums[index])
        for index, total in enumerate(sums):
            tile_row, tile_token = divmod(index, self.tokens)
            target = (token + tile_token) * args.number("rows") + row + tile_row
            value = reduced(function, total, "fadd")
            store_fp32(args.pointer("out"), value, target, self._bf16)
        function.finish()


def _write_multiply(module: Any, tiles: Sequence[Sequence[_DenseTile]]) -> None:
    """Write `multiply`. An item of work is `_GROUP` rows and one chunk of tokens."""
    function = Function(module, "multiply")
    args = _SIGNATURE.read_by(function)
    rows, tokens, chunk = (args.number(name) for name in ("rows", "tokens", "chunk"))
    groups = (rows + (_GROUP - 1)) // _GROUP
    chunks = (tokens + chunk - 1) // chunk
    with function.each_item(function.pointer, groups * chunks) as item:
        start = item // groups * chunk
        end = function.minimum(start + chunk, tokens)
        row = item % groups * _GROUP
        last_row = function.minimum(row + _GROUP, rows)
        # The widest tiles first. Each next size takes the rows, and the tokens, that remain.
        for tiles_of_height in tiles:
            height = tiles_of_height[0].rows
            next_row = row + (last_row - row) // height * height
            with function.loop(row, next_row, height) as (tile_row, _):
                token = start
                for tile in tiles_of_height:
                    next_token = token + (end - token) // tile.tokens * tile.tokens
                    with function.loop(token, next_token, tile.tokens) as (tile_token, _):
                        function.call_own(tile.function, function.pointer, tile_row, tile_token)
                    token = next_token
            row = next_row
    function.finish()
