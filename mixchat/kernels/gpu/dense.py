"""The product of one token's row with a matrix of few rows that is not quantized.

R = rows, D = columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from mixchat.kernels.gpu.launch import launch

_BLOCK = 1024  # columns that a program reads at once


def dense_product(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """Write weight [R, D] times x [D] to `out` [R], rounded once."""
    rows, columns = weight.shape
    block = min(_BLOCK, triton.next_power_of_2(columns))
    launch(_dense_product, (rows,), x, weight, out, D=columns, BLOCK=block, num_warps=4)


@triton.jit
def _dense_product(x, weight, out, D: tl.constexpr, BLOCK: tl.constexpr):
    """Compute one number."""
    row = tl.program_id(0)
    products = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, D, BLOCK):
        column = start + tl.arange(0, BLOCK)
        numbers = tl.load(x + column, column < D, 0.0).to(tl.float32)
        weights = tl.load(weight + row * D + column, column < D, 0.0).to(tl.float32)
        products = tl.fma(numbers, weights, products)
    tl.store(out + row, tl.sum(products).to(out.dtype.element_ty))
