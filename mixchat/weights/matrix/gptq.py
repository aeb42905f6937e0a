"""Rounds a matrix by GPTQ (Frantar et al., arXiv:2210.17323).

Columns are rounded one after the other. Later columns make up for what that changes in the
products. H is the mean of x x^T over the inputs x, and H = F D F^T with D diagonal and F an upper
triangle with ones on its diagonal. An error e in column i, that is what rounding took off it,
changes column j > i by e * F[i, j]. That is the same as GPTQ (Chee et al., arXiv:2307.13304), which
needs the factor of inverse(H), and takes a quarter of the time.

With few rows, H is mostly noise, so it is shrunk toward its diagonal.

R = rows, C = columns, n = inputs, B = blocks of 64 weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from mixchat.weights.matrix.quant_type import BLOCKSIZE

_PIECE = 4096  # rows that are widened or multiplied at once
_BAND = 1024  # rows of H that are computed at once
_PRIOR = 32  # inputs whose columns are alike, added to the given ones
_TINY = 1e-38
# Takes the place of a column, what it should be [R], and scales [R]. Returns what it is rounded to.
Rounder = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]


def shrinkage(rows: int, columns: int) -> float:
    """Return by how much H of so many inputs is shrunk. 1 leaves its diagonal alone.

    On the demo's matrices it was best or within 3% of the best of several formulas, for other texts
    than were calibrated with.
    """
    return math.sqrt(columns / (columns + rows))


def feedback_factor(inputs: torch.Tensor) -> torch.Tensor:
    """Return F [C, C], fp32, for inputs [n, C], with H shrunk toward its diagonal."""
    sizes = mean_squares(inputs).sqrt()
    kept = 1 - shrinkage(*inputs.shape)
    correlations = torch.zeros(len(sizes), len(sizes))
    for piece in torch.split(inputs, _PIECE):
        # The other way round, because a lower factor of this is an upper one of H.
        scaled = piece.flip(-1).float().div_(sizes.flip(0))
        for start in range(0, len(sizes), _BAND):
            end = start + _BAND  # the upper triangle is not needed
            lower = correlations[start:end, :end]
            lower.addmm_(scaled[:, start:end].T, scaled[:, :end], alpha=kept / len(inputs))
    correlations.diagonal().fill_(1)
    triangle = torch.linalg.cholesky(correlations)
    del correlations
    factor: torch.Tensor = triangle.flip(0, 1)
    return factor.div_(factor.diagonal() * sizes).mul_(sizes.unsqueeze(-1))


def mean_squares(inputs: torch.Tensor) -> torch.Tensor:
    """Return the mean square of each column of inputs [n, C], which is H's diagonal, fp32 [C].

    It is drawn toward the mean of all columns. None is less than a thousandth of the mean.
    """
    squares = torch.zeros(inputs.shape[1])
    for piece in torch.split(inputs, _PIECE):
        squares += piece.float().square().sum(0)
    mean = (squares.mean() / len(inputs)).clamp(min=_TINY)
    return ((squares + _PRIOR * mean) / (len(inputs) + _PRIOR)).clamp(min=mean / 1000)


def sum_of_squares(matrix: torch.Tensor, inputs: torch.Tensor) -> float:
    """Return the sum of the squares of the products of a matrix [R, C] with inputs [n, C]."""
    rows, pieces = inputs.float(), torch.split(matrix, _PIECE)
    return sum(float((rows @ piece.T).square().sum()) for piece in pieces)


def nearest_levels(levels: torch.Tensor, codes: torch.Tensor) -> Rounder:
    """Return what rounds to levels, which rise, fp32. It fills `codes` [C, R]."""
    boundaries = (levels[1:] + levels[:-1]) / 2

    def rounded(place: int, column: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        nearest = torch.bucketize(column / scale.where(scale != 0, 1), boundaries)
        codes[place] = nearest
        return levels[nearest] * scale

    return rounded


def round_columns(
    weight: torch.Tensor, scales: torch.Tensor, rounded: Rounder, factor: torch.Tensor
) -> None:
    """Let `rounded` round the columns of weight [R, C], with C a multiple of 64.

    `scales` [B] are fp32. `factor` is F.
    """
    rows = len(weight)
    left = weight.float().T.contiguous()  # [C, R], with what earlier columns have lost
    by_block = scales.view(rows, -1).T  # [C / 64, R]
    for block, scale in enumerate(by_block):
        start, end = block * BLOCKSIZE, (block + 1) * BLOCKSIZE
        here, errors = left[start:end], weight[:, start:end].float().T.contiguous()
        for place, error in enumerate(errors):
            error -= rounded(start + place, here[place], scale)
            here[place + 1 :].addr_(factor[start + place, start + place + 1 : end], error)
        left[end:].addmm_(factor[start:end, end:].T, errors)
