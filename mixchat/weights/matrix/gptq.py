"""Rounds a matrix by GPTQ (Frantar et al., arXiv:2210.17323).

Columns are rounded one after the other. Later columns make up for the changes in the products. H is
the mean of x x^T over the inputs x, and H = F D F^T with D diagonal and F an upper triangle with
ones on its diagonal. If rounding took e off column i, column j > i changes by e * F[i, j]. That is
the same as GPTQ (Chee et al., arXiv:2307.13304), which needs the factor of inverse(H), and takes a
quarter of the time.

With few rows, H is mostly noise, so it is shrunk toward its diagonal.

R = rows, C = columns, n = inputs, B = blocks of 64 weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from mixchat.weights.matrix.quant_type import BLOCKSIZE, Inputs

_PIECE = 4096  # rows that are widened or multiplied at once
_BAND = 1024  # rows of H that are computed at once
_PRIOR = 32  # the weight of the prior, in inputs whose columns are alike
_FITTED = 512  # rows whose scales are fitted at once
_LEAST_CHANGE = 0.25  # the least quotient of a fitted scale and the one before
_TINY = 1e-38
# Takes the index of a column, its values [R] and scales [R]. Returns the rounded values [R].
Rounder = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]


def shrinkage(rows: int, columns: int) -> float:
    """Return the factor by which H of `rows` inputs is shrunk. 1 leaves only its diagonal.

    Of several formulas, this one was best on the demo's matrices or within 3% of the best, for
    texts that were not used for calibrating.
    """
    return math.sqrt(columns / (columns + rows))


class Feedback(NamedTuple):
    """H = F D F^T of some inputs, fp32."""

    factor: torch.Tensor  # F [C, C]
    diagonal: torch.Tensor  # of D [C]
    correlations: torch.Tensor  # H [C, C] with its columns reversed, over the sizes
    sizes: torch.Tensor  # the roots of H's diagonal [C]


def feedback_of(inputs: torch.Tensor) -> Feedback:
    """Return the factors for inputs [n, C], with H shrunk toward its diagonal."""
    sizes = mean_squares(inputs).sqrt()
    kept = 1 - shrinkage(*inputs.shape)
    correlations = torch.zeros(len(sizes), len(sizes))
    for piece in torch.split(inputs, _PIECE):
        # The columns are reversed, because Cholesky's lower factor then is an upper factor of H.
        scaled = piece.flip(-1).float().div_(sizes.flip(0))
        for start in range(0, len(sizes), _BAND):
            end = start + _BAND  # the upper triangle is not needed
            lower = correlations[start:end, :end]
            lower.addmm_(scaled[:, start:end].T, scaled[:, :end], alpha=kept / len(inputs))
    for start in range(0, len(sizes), _BAND):
        end = start + _BAND
        correlations[:start, start:end] = correlations[start:end, :start].T
    correlations.diagonal().fill_(1)
    triangle = torch.linalg.cholesky(correlations)
    factor: torch.Tensor = triangle.flip(0, 1)
    diagonal = factor.diagonal() * sizes
    factor.div_(diagonal).mul_(sizes.unsqueeze(-1))
    return Feedback(factor, diagonal.square(), correlations, sizes)


def corrected(weight: torch.Tensor, feedback: Feedback, inputs: Inputs) -> torch.Tensor:
    """Return the weight [R, C], fp32, that makes up for rounded matrices before it.

    Its products with `fit` come nearest to the right products (GPTAQ, Li et al., arXiv:2504.02692).
    """
    result = weight.float()
    if inputs.exact is None:
        return result
    factor = feedback.factor
    moved = torch.zeros_like(result)
    kept = 1 - shrinkage(*inputs.fit.shape)
    for rows, exact in zip(
        *(torch.split(x, _PIECE) for x in (inputs.fit, inputs.exact[0])), strict=True
    ):
        missing = (exact.float() - rows.float()) @ result.T
        moved.addmm_(missing.T, rows.float(), alpha=kept / len(inputs.fit))
    # moved / H
    moved = _solve(factor.T, moved, upper=False).div_(feedback.diagonal)
    return result + _solve(factor, moved, upper=True)


def _solve(triangle: torch.Tensor, product: torch.Tensor, *, upper: bool) -> torch.Tensor:
    """Return x [R, C] with x @ triangle = product."""
    solution: torch.Tensor = torch.linalg.solve_triangular(
        triangle, product, upper=upper, left=False, unitriangular=True
    )
    return solution


def mean_squares(inputs: torch.Tensor) -> torch.Tensor:
    """Return the mean square of each column of inputs [n, C], which is H's diagonal, fp32 [C].

    It is drawn toward the mean of all columns. None is less than a thousandth of the mean.
    """
    squares = torch.zeros(inputs.shape[1])
    for piece in torch.split(inputs, _PIECE):
        squares += piece.float().square().sum(0)
    mean = (squares.mean() / len(inputs)).clamp(min=_TINY)
    return ((squares + _PRIOR * mean) / (len(inputs) + _PRIOR)).clamp(min=mean / 1000)


def error_of_products(matrix: torch.Tensor, weight: torch.Tensor, inputs: Inputs) -> float:
    """Return the sum of the squared errors of products with `held_out`.

    matrix: what stands for weight [R, C], fp32.
    """
    rows = inputs.held_out.float()
    exact = rows if inputs.exact is None else inputs.exact[1].float()
    pieces = zip(torch.split(matrix, _PIECE), torch.split(weight, _PIECE), strict=True)
    return sum(
        float((rows @ rounded.T - exact @ exact_weight.float().T).square().sum())
        for rounded, exact_weight in pieces
    )


def nearest_levels(levels: torch.Tensor, codes: torch.Tensor) -> Rounder:
    """Return a rounder to rising fp32 levels, which fills `codes` [C, R]."""
    boundaries = (levels[1:] + levels[:-1]) / 2

    def rounded(index: int, column: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        nearest = torch.bucketize(column / scale.where(scale != 0, 1), boundaries)
        codes[index] = nearest
        return levels[nearest] * scale

    return rounded


def round_with_fitted_scales(
    weight: torch.Tensor,
    scales: torch.Tensor,
    rounded: Rounder,
    feedback: Feedback,
    stored: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Round columns twice, the second time with the scales that suit the first codes best.

    Returns these scales, fp32 [R, C / 64]. `stored` rounds scales as they are stored.
    """
    first = round_columns(weight, scales, rounded, feedback.factor)
    better = stored(fitted_scales(weight, first, scales, feedback))
    round_columns(weight, better, rounded, feedback.factor)
    return better


def round_columns(
    weight: torch.Tensor, scales: torch.Tensor, rounded: Rounder, factor: torch.Tensor
) -> torch.Tensor:
    """Let `rounded` round the columns of weight [R, C], with C a multiple of 64.

    Returns what they are rounded to. `scales` [R, C / 64] are fp32. `factor` is F.
    """
    remaining = weight.float().T.contiguous()  # [C, R], with the errors of earlier columns added
    for block, scale in enumerate(scales.T):
        start = block * BLOCKSIZE
        end = (block + 1) * BLOCKSIZE
        columns = remaining[start:end]
        errors = weight[:, start:end].float().T.contiguous()
        for number, error in enumerate(errors):
            index = start + number
            columns[number] = rounded(index, columns[number], scale)
            error -= columns[number]
            columns[number + 1 :].addr_(factor[index, index + 1 : end], error)
        # Later blocks get the errors of 64 columns in one product, so they are read once.
        remaining[end:].addmm_(factor[start:end, end:].T, errors)
    return remaining.T


def fitted_scales(
    weight: torch.Tensor, rounded: torch.Tensor, scales: torch.Tensor, feedback: Feedback
) -> torch.Tensor:
    """Return the scales with the least error of products if all codes stay.

    `rounded` [R, C] is what weight [R, C] was rounded to with `scales` [R, C / 64].
    """
    # The normal equations take C / 64 numbers squared for each row.
    pieces = zip(*(torch.split(x, _FITTED) for x in (weight, rounded, scales)), strict=True)
    return torch.cat([_fitted(feedback, *piece) for piece in pieces])


def _fitted(
    feedback: Feedback, weight: torch.Tensor, rounded: torch.Tensor, scales: torch.Tensor
) -> torch.Tensor:
    """Solve the normal equations of each row. Columns are reversed, as in the Hessian."""
    sizes = feedback.sizes.flip(0)
    old = scales.flip(-1)
    divisor = old.where(old != 0, 1).repeat_interleave(BLOCKSIZE, -1)
    codes = rounded.flip(-1) / divisor * sizes
    target = weight.flip(-1) * sizes
    normal = old.new_empty(*old.shape, old.shape[1])
    rhs = torch.empty_like(old)
    for block, correlations in enumerate(torch.split(feedback.correlations, BLOCKSIZE)):
        columns = slice(block * BLOCKSIZE, (block + 1) * BLOCKSIZE)
        product = codes[:, columns] @ correlations  # [R, C]
        rhs[:, block] = (product * target).sum(-1)
        normal[:, block] = (product * codes).view(len(old), -1, BLOCKSIZE).sum(-1)
    # A block of zeros has no equation of its own. The matrix would be singular.
    diagonal = normal.diagonal(dim1=-2, dim2=-1)
    diagonal += 1e-6 * diagonal.mean(-1, keepdim=True) + _TINY
    fitted: torch.Tensor = torch.linalg.solve(normal, rhs)
    # A scale may not vanish or change its sign. Such a block keeps the old scale.
    return fitted.where(fitted / old > _LEAST_CHANGE, old).flip(-1)
