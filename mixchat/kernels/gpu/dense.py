"""The product of one token's row with a matrix of few rows that is not quantized.

R = rows, D = columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mixchat.kernels.gpu.launch import launch

_BLOCK = 1024  # columns that a program reads at once


def block_of(columns: int) -> int:
    """Return how many of these columns `dot` reads at once."""
    return min(_BLOCK, triton.next_power_of_2(columns))


def dense_product(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """Write weight [R, D] times x [D] to `out` [R], rounded once."""
    rows, columns = weight.shape
    block = block_of(columns)
    launch(_dense_product, (rows,), x, weight, out, D=columns, BLOCK=block, num_warps=4)


@triton.jit
def _dense_product(x, weight, out, D: tl.constexpr, BLOCK: tl.constexpr):
    """Compute one number."""
    row = tl.program_id(0)
    tl.store(out + row, dot(x, weight + row * D, D, BLOCK).to(out.dtype.element_ty))


@triton.jit
def dot(x, weights, D: tl.constexpr, BLOCK: tl.constexpr):
    """Return the sum of x times the weights, D of each, in fp32."""
    products = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, D, BLOCK):
        column = start + tl.arange(0, BLOCK)
        numbers = tl.load(x + column, column < D, 0.0).to(tl.float32)
        row = tl.load(weights + column, column < D, 0.0).to(tl.float32)
        products = tl.fma(numbers, row, products)
    return tl.sum(products)
