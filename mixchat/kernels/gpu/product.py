"""Multiplies a few rows with a matrix on a GPU.

Programs share the bands of rows, and splits of the columns if the bands are few. Each split writes
its own partial sums, which whoever reads them adds up. So the same numbers give the same bits.

n = rows of x, R = rows of the matrix, S = splits of its columns, C = columns, T = threads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from mixchat.base import gpu
from mixchat.kernels.gpu import codes as coded
from mixchat.kernels.gpu.codes import TILES
from mixchat.kernels.gpu.launch import launch

MANY = 8  # rows of x that a product takes at most
_AT_ONCE = 2  # rows of x in one program, whose sums fit in its registers
_PROGRAMS = 4 * 132  # that keep a large GPU busy
_THREADS = 128  # of a program
_WASTE = 1.15  # blocks that are read for each block, from which on fewer threads read them
_REGISTERS = 64  # of a thread, at most
_LEAST_STEPS = 2  # of a program, which has to add up its threads' sums at the end


class Form(NamedTuple):
    """The form of a matrix in memory: dense rows, or codes in the order that CPUs read, too."""

    quant_type: str
    rows: int  # R
    stored_rows: int  # with rows of zeros, which fill up the last band
    columns: int  # C, whole blocks
    wide: bool = False  # whether dense numbers are fp32

    @property
    def tile(self) -> coded.CodeTile:
        return TILES[self.kernel_type]

    @property
    def kernel_type(self) -> str:
        """Return the name that kernels know."""
        return "none32" if self.quant_type == "none" and self.wide else self.quant_type

    @property
    def is_supported(self) -> bool:
        """Return whether the kernels take this matrix."""
        if self.kernel_type not in TILES or self.columns % self.tile.block:
            return False
        return self.quant_type == "none" or self.stored_rows % self.tile.band == 0


@dataclass(frozen=True)
class Matrix:
    """A matrix on a GPU. Each tensor begins on a boundary of 16 bytes.

    codes: of any type, or a dense matrix of the type of x. absmax: as stored. levels: from
    `codes.level_table`, or None if codes are numbers themselves. bias: fp32 [R].
    """

    form: Form
    codes: torch.Tensor
    absmax: torch.Tensor | None = None
    levels: torch.Tensor | None = None
    bias: torch.Tensor | None = None


class Split(NamedTuple):
    """The share of a program in the columns of a matrix."""

    threads: int
    blocks: int
    count: int  # S


def split(form: Form, products: int = 1) -> Split:
    """Return the split for so many products with matrices of this form at the same time."""
    tile = form.tile
    blocks = form.columns // tile.block

    threads = _THREADS
    step = _THREADS // tile.threads
    half = max(1, step // 2)
    # In the last step, threads may have no block. Half of them may read far fewer blocks in all.
    if -(-blocks // step) * step > _WASTE * -(-blocks // half) * half:
        threads = threads // 2
        step = half
    steps = -(-blocks // step)
    programs = -(-form.stored_rows // tile.band) * products
    count = max(1, min(_PROGRAMS // programs, steps // _LEAST_STEPS))
    per = -(-steps // count) * step
    return Split(threads, per, -(-blocks // per))


def constants(form: Form, threads: int, *, halves: int = 1, rows: int = 1) -> dict[str, Any]:
    """Return the constants of each kernel that reads a matrix, and Triton's options.

    threads: of a band of rows, and of each half of a program. rows: of x, in a program. Codes of 4
    to 8 bits then leave registers for half of the threads of any card of NVIDIA, and no number is
    in local memory, as `tests/kernels/gpu/assembly.py` shows.
    """
    result = {"R": form.stored_rows, "C": form.columns, "T": threads, "TYPE": form.kernel_type}
    result |= {"LANES": coded.lanes(), "num_warps": halves * threads // coded.lanes()}
    is_limited = 4 <= form.tile.bits <= 8 and rows == 1 and not gpu.is_amd()
    return result | {"maxnreg": _REGISTERS} if is_limited else result


def product(x: torch.Tensor, matrix: Matrix, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return x [n, C] times the transposed matrix, and its bias, as sums fp32 [S, n, R].

    n is at most `MANY`. x is contiguous. The result is the sum over S of `split(matrix.form)`.
    """
    form = matrix.form
    parts = split(matrix.form)
    if out is None:
        out = x.new_empty(parts.count, len(x), form.rows, dtype=torch.float32)
    at_once = min(_AT_ONCE, 1 << (len(x) - 1).bit_length())
    bands = -(-form.stored_rows // form.tile.band)
    launch(
        _product,
        (bands, parts.count, -(-len(x) // at_once)),
        *(x, matrix.codes, x if matrix.absmax is None else matrix.absmax),
        *(x if matrix.levels is None else matrix.levels, matrix.bias, out, len(x)),
        ROWS=form.rows,
        N=at_once,
        PER=parts.blocks,
        **constants(form, parts.threads, rows=at_once),
    )
    return out


def head_products(
    x: torch.Tensor,
    addresses: torch.Tensor,
    form: Form,
    levels: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Store the product of each of N rows of x [N, C] with its own matrix in `out` [N, at least R].

    addresses: of the matrices' codes, and then of their scales, int64 [2, N] on the GPU, multiples
    of 16. All have the same form, and no bias.
    """
    threads = form.columns // form.tile.block * form.tile.threads
    threads = min(max(triton.next_power_of_2(threads), _THREADS // 2), _THREADS)
    launch(
        _head_products,
        (-(-form.stored_rows // form.tile.band), len(x)),
        *(x, addresses, x if levels is None else levels, out),
        N=len(x),
        ROWS=form.rows,
        STRIDE=out.stride(0),
        **constants(form, threads),
    )


@triton.jit
def band_product(
    x,
    rows,
    codes,
    absmax,
    levels,
    row,
    thread,
    first,
    end,
    R: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    TYPE: tl.constexpr,
):
    """Return the products of bands with rows of x, for each a tensor fp32 [threads, its rows].

    A thread sums up its own columns of blocks `first` to `end`. `T` threads share a band.
    rows: of x, a tuple of their numbers. row: the first one of the thread's band. thread: its
    number among `T`. Both are tensors of all threads.
    """
    if TYPE == "none" or TYPE == "none32":
        return _dense_product(x, rows, codes, row, thread, first, end, R, C, T, TYPE)
    else:
        return _coded_product(x, rows, codes, absmax, levels, row, thread, first, end, C, T, TYPE)


@triton.jit
def _coded_product(
    x,
    rows,
    codes,
    absmax,
    levels,
    row,
    thread,
    first,
    end,
    C: tl.constexpr,
    T: tl.constexpr,
    TYPE: tl.constexpr,
):
    THREADS: tl.constexpr = coded.tile("threads", TYPE)
    COUNT: tl.constexpr = coded.tile("band", TYPE) // coded.tile("parts", TYPE)
    place = thread % THREADS
    totals = _zeros(len(rows), thread.shape[0], COUNT)
    for start in range(first, end, T // THREADS):
        block = start + thread // THREADS
        # Threads beyond the end compute the last block again, with zeros for x. For AMD, each load
        # with a mask would become a branch.
        is_inside = block < end
        block = tl.minimum(block, end - 1)
        words = coded.load(codes, row, block, place, C, TYPE)
        sums = _zeros(len(rows), thread.shape[0], COUNT)
        for pair in tl.static_range(coded.tile("pairs", TYPE)):
            even, odd = coded.numbers(words, pair, levels, TYPE)
            column = block * coded.tile("block", TYPE) + coded.column(place, pair, TYPE)
            added = ()
            for index in tl.static_range(len(rows)):
                at = x + (rows[index] * C + column)[:, None] + tl.arange(0, 2)[None, :]
                pair_of_x = tl.where(is_inside[:, None], tl.load(at).to(tl.float32), 0.0)
                left, right = tl.split(pair_of_x)
                with_left = tl.fma(even, left[:, None], sums[index])
                added += (tl.fma(odd, right[:, None], with_left),)
            sums = added
        scale = coded.scales(absmax, row, block, place, C, TYPE)
        added = ()
        for index in tl.static_range(len(rows)):
            added += (tl.fma(sums[index], scale, totals[index]),)
        totals = added
    return totals


@triton.jit
def _dense_product(
    x,
    rows,
    weight,
    row,
    thread,
    first,
    end,
    R: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    TYPE: tl.constexpr,
):
    BLOCK: tl.constexpr = coded.tile("block", TYPE)
    weight = weight.to(tl.pointer_type(x.dtype.element_ty))
    totals = _zeros(len(rows), thread.shape[0], 8)
    for start in range(first, end, T):
        block = start + thread
        is_inside = block < end
        block = tl.minimum(block, end - 1)
        columns = (block * BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :]
        numbers = ()
        for index in tl.static_range(8):
            at = weight + tl.minimum(row + index, R - 1).to(tl.int64) * C
            numbers += (tl.load(at[:, None] + columns).to(tl.float32),)
        added = ()
        for index in tl.static_range(len(rows)):
            at = x + rows[index] * C + columns
            numbers_of_x = tl.where(is_inside[:, None], tl.load(at).to(tl.float32), 0.0)
            sums = ()
            for of_band in tl.static_range(8):
                sums += (tl.sum(numbers[of_band] * numbers_of_x, 1)[:, None],)
            low = coded.join4(sums[0], sums[2], sums[4], sums[6])
            high = coded.join4(sums[1], sums[3], sums[5], sums[7])
            together = tl.join(low, high).reshape(thread.shape[0], 8)
            added += (totals[index] + together,)
        totals = added
    return totals


@triton.jit
def _zeros(N: tl.constexpr, T: tl.constexpr, COUNT: tl.constexpr):
    result = ()
    for _ in tl.static_range(N):
        result += (tl.zeros((T, COUNT), tl.float32),)
    return result


@triton.jit
def _product(
    x,
    codes,
    absmax,
    levels,
    bias,
    out,
    n,
    ROWS: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    PER: tl.constexpr,
    T: tl.constexpr,
    LANES: tl.constexpr,
    TYPE: tl.constexpr,
):
    BAND: tl.constexpr = coded.tile("band", TYPE)
    first = tl.program_id(1) * PER
    end = tl.minimum(first + PER, C // coded.tile("block", TYPE))
    rows = ()
    for index in tl.static_range(N):
        rows += (tl.minimum(tl.program_id(2) * N + index, n - 1),)
    thread = tl.arange(0, T)
    row = tl.program_id(0) * BAND
    table = coded.table(levels, LANES, TYPE)
    sums = band_product(
        x, rows, codes, absmax, table, row + thread * 0, thread, first, end, R, C, T, TYPE
    )
    row += coded.row_of(TYPE)
    added = tl.zeros((BAND,), tl.float32)
    if bias is not None and tl.program_id(1) == 0:
        added = tl.load(bias + row, mask=row < ROWS, other=0)
    for index in tl.static_range(N):
        total = tl.sum(sums[index].reshape(T // coded.tile("parts", TYPE), BAND), 0)
        at = out + (tl.program_id(1) * n + rows[index]) * ROWS + row
        tl.store(at, total + added, mask=row < ROWS)


@triton.jit
def _head_products(
    x,
    addresses,
    levels,
    out,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    T: tl.constexpr,
    LANES: tl.constexpr,
    TYPE: tl.constexpr,
):
    BAND: tl.constexpr = coded.tile("band", TYPE)
    head = tl.program_id(1)
    thread = tl.arange(0, T)
    codes = tl.load(addresses + head).to(tl.pointer_type(tl.uint8))
    absmax = tl.load(addresses + N + head).to(tl.pointer_type(tl.uint8))
    sums = band_product(
        x + head * C,
        (0,),
        tl.multiple_of(codes, 16),
        tl.multiple_of(absmax, 16),
        coded.table(levels, LANES, TYPE),
        tl.program_id(0) * BAND + thread * 0,
        thread,
        0,
        C // coded.tile("block", TYPE),
        R,
        C,
        T,
        TYPE,
    )
    row = tl.program_id(0) * BAND + coded.row_of(TYPE)
    total = tl.sum(sums[0].reshape(T // coded.tile("parts", TYPE), BAND), 0)
    tl.store(out + head * STRIDE + row, total, mask=row < ROWS)
