"""The kernel between two parts of a layer, which adds a part's output and normalizes the sum.

P = partial sums, D = hidden_size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mixchat.kernels.gpu.launch import launch

# Numbers of partial sums that one program reads in less time than programs wait for each other.
_MOST_OF_ONE_PROGRAM = 2**14
_COLUMNS = 128  # of a program, if there are several
_MAX_ROWS = 64  # partial sums that are loaded at once


def add_norm(
    x: torch.Tensor,
    partials: torch.Tensor,
    weight: torch.Tensor,
    normed: torch.Tensor,
    eps: float,
    finished: torch.Tensor,
    *,
    adds: bool = True,
    factor: float | None = None,
) -> None:
    """Add the sum of partials [P, D], fp32, to x [D]. Store rms_norm(x) * weight in normed [D].

    D is a multiple of 16, and P may be 0. Partials may be parts of longer rows, or one of them may
    be `normed`. The sum is rounded to the type of x before it is added,
    and the norm before it is multiplied, as on CPUs, unless the weight is in fp32. But partial sums
    of two parts are rounded once and not each: x then differs by one rounding. `finished`, int32,
    is a counter that is 0 between two calls. If it does not add, the sum replaces x. `factor`
    multiplies the new x.
    """
    count, columns = partials.shape
    alone = count * columns <= _MOST_OF_ONE_PROGRAM
    block = triton.next_power_of_2(columns)
    part = block if alone else _COLUMNS
    launch(
        _add_norm,
        (triton.cdiv(columns, part),),
        *(x, partials, weight, normed, finished, eps),
        D=columns,
        P=count,
        R=partials.stride(0),
        BLOCK=block,
        PART=part,
        ROWS=1 if alone else min(triton.next_power_of_2(count), _MAX_ROWS),
        ADDS=adds,
        FACTOR=factor,
        num_warps=min(max(block // 512, 4), 16),
    )


@triton.jit
def _add_norm(
    x,
    partials,
    weight,
    normed,
    finished,
    eps,
    D: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    ADDS: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """Sum PART columns. The last program to finish normalizes all."""
    columns = tl.program_id(0) * PART + tl.arange(0, PART)
    inside = columns < D
    numbers = tl.load(x + columns, inside, 0.0)
    if P > 0:
        sums = summed(partials, columns, inside, P, R, ROWS)
        added = sums.to(numbers.dtype)
        if ADDS:
            numbers = (numbers.to(tl.float32) + added.to(tl.float32)).to(numbers.dtype)
        else:
            numbers = added
        if FACTOR is not None:
            numbers = (numbers.to(tl.float32) * FACTOR).to(numbers.dtype)
        tl.store(x + columns, numbers, inside)
    if PART == BLOCK:
        weights = tl.load(weight + columns, inside, 0.0)
        tl.store(normed + columns, normalized(numbers, weights, eps, D), inside)
    else:
        # All threads have stored their numbers before one of them counts the program.
        tl.debug_barrier()
        if tl.atomic_add(finished, 1) == tl.num_programs(0) - 1:
            tl.store(finished, 0)
            every = tl.arange(0, BLOCK)
            # Other programs have stored these, and the first-level cache is each one's own.
            all_numbers = tl.load(x + every, every < D, 0.0, cache_modifier=".cg")
            weights = tl.load(weight + every, every < D, 0.0)
            tl.store(normed + every, normalized(all_numbers, weights, eps, D), every < D)


@triton.jit
def normalized(x, weights, eps, D: tl.constexpr):
    """Return x / rms(x), rounded to the weights' type, times the weights, in the type of x."""
    wide = x.to(tl.float32)
    factor = tl.rsqrt(tl.sum(wide * wide) / D + eps)
    scaled = (wide * factor).to(weights.dtype).to(tl.float32)
    return (scaled * weights.to(tl.float32)).to(x.dtype)


@triton.jit
def summed(partials, columns, inside, P: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr):
    """Return the sums of some columns of partials [P, R], ROWS partials at a time."""
    sums = tl.zeros(columns.shape, tl.float32)
    for start in tl.static_range(0, P, ROWS):
        if ROWS == 1:
            sums += tl.load(partials + start * R + columns, inside, 0.0)
        else:
            rows = start + tl.arange(0, ROWS)[:, None]
            mask = (rows < P) & inside[None, :]
            sums += tl.sum(tl.load(partials + rows * R + columns[None, :], mask, 0.0), 0)
    return sums
