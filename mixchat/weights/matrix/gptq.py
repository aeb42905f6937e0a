"""GPTQ: rounds a matrix so that its products with given inputs change little, not its weights.

Columns are rounded one after the other. What rounding a column changes in the products is made up
for in the columns behind it, as far as the inputs of both go together. With H the mean of x x^T
over the inputs x, and U the upper triangle of inverse(H) = U^T U, an error e in column i changes
column j > i by -e * U[i, j] / U[i, i]. GPTQ is due to Frantar et al. (arXiv:2210.17323).

The scales are chosen before, for the least error weighted by H's diagonal (`encode.py`).

R = rows, C = columns, n = inputs, B = blocks of 64 weights.
"""

from __future__ import annotations

import torch

from mixchat.weights.matrix.blocks import BLOCKSIZE

_DAMPING = 0.01  # of the mean of H's diagonal, which is added to it: inputs are few


def inverse_factor(inputs: torch.Tensor) -> torch.Tensor:
    """Return U [C, C], fp32, for inputs [n, C]."""
    wide = inputs.float()
    hessian = wide.T @ wide / len(wide)
    diagonal = hessian.diagonal()
    diagonal += _DAMPING * diagonal.mean().clamp(min=1e-30)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor


def round_columns(
    weight: torch.Tensor, scales: torch.Tensor, levels: torch.Tensor, factor: torch.Tensor
) -> torch.Tensor:
    """Return codes, one a byte [B, 64], of weight [R, C] with C a multiple of 64.

    scales: fp32 [B]; levels: fp32, rising; factor: U.
    """
    rows, columns = weight.shape
    boundaries = (levels[1:] + levels[:-1]) / 2
    left = weight.float().T.contiguous()  # [C, R], without what earlier columns have cost
    codes = torch.empty(columns, rows, dtype=torch.uint8)
    by_block = scales.view(rows, -1).T  # [C / 64, R]
    for block, scale in enumerate(by_block):
        start, end = block * BLOCKSIZE, (block + 1) * BLOCKSIZE
        here, errors = left[start:end], torch.empty(BLOCKSIZE, rows)
        safe = scale.where(scale != 0, 1)
        for place in range(BLOCKSIZE):
            row = factor[start + place, start + place : end]
            nearest = torch.bucketize(here[place] / safe, boundaries)
            codes[start + place] = nearest
            errors[place] = (here[place] - levels[nearest] * scale) / row[0]
            here[place:].addr_(row, errors[place], alpha=-1)
        left[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1)
    return codes.T.contiguous().view(-1, BLOCKSIZE)
