"""Turns some rows of a matrix of codes into dense ones on a GPU, for products with many rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mixchat.kernels.gpu import codes as coded
from mixchat.kernels.gpu.launch import launch
from mixchat.kernels.gpu.product import Matrix

_THREADS = 128


def dequantize(matrix: Matrix, out: torch.Tensor, first_row: int = 0) -> None:
    """Write the rows of a matrix of codes from `first_row` on, which begins a band, to out [n, C].

    Rows of `out` beyond the matrix's stay as they are.
    """
    form = matrix.form
    tile = matrix.form.tile
    assert first_row % tile.band == 0
    blocks = _THREADS // tile.threads
    rows = min(len(out), form.rows - first_row)
    launch(
        _dequantize,
        (-(-rows // tile.band), -(-form.columns // tile.block // blocks)),
        matrix.codes,
        matrix.absmax,
        out if matrix.levels is None else matrix.levels,
        out,
        first_row,
        rows,
        C=form.columns,
        T=_THREADS,
        LANES=coded.lanes(),
        TYPE=form.kernel_type,
        num_warps=_THREADS // coded.lanes(),
    )


@triton.jit
def _dequantize(
    codes,
    absmax,
    levels,
    out,
    first_row,
    rows,
    C: tl.constexpr,
    T: tl.constexpr,
    LANES: tl.constexpr,
    TYPE: tl.constexpr,
):
    BAND: tl.constexpr = coded.tile("band", TYPE)
    PARTS: tl.constexpr = coded.tile("parts", TYPE)
    BLOCKS: tl.constexpr = T // coded.tile("threads", TYPE)
    thread = tl.arange(0, T)
    place = thread % coded.tile("threads", TYPE)
    block = tl.program_id(1) * BLOCKS + thread // coded.tile("threads", TYPE)
    is_inside = block < C // coded.tile("block", TYPE)
    block = tl.minimum(block, C // coded.tile("block", TYPE) - 1)
    start = tl.program_id(0) * BAND
    row = first_row + start + thread * 0
    words = coded.load(codes, row, block, place, C, TYPE)
    scale = coded.scales(absmax, row, block, place, C, TYPE)
    # Rows of the thread, [T, rows]
    own = start + coded.rows_of(thread % PARTS, TYPE)
    at = out + own.to(tl.int64) * C
    mask = (is_inside[:, None] & (own < rows))[:, :, None]
    table = coded.table(levels, LANES, TYPE)
    for pair in tl.static_range(coded.tile("pairs", TYPE)):
        even, odd = coded.numbers(words, pair, table, TYPE)
        column = block * coded.tile("block", TYPE) + coded.column(place, pair, TYPE)
        two = tl.join(even * scale, odd * scale).to(out.dtype.element_ty)
        columns = column[:, None, None] + tl.arange(0, 2)[None, None, :]
        tl.store(at[:, :, None] + columns, two, mask=mask)
