"""Rounds a matrix to the numbers of a trellis on the CPU, with searched scales.

A number errs about as much wherever it lies, up to the largest number of the table. So a block's
scale is chosen for the least sum of two errors: the mean error of numbers times the square of the
scale, for each weight, and the squares of what larger weights have beyond the largest number.

R = rows and C = columns, whole rings and blocks of 64 weights. W = words of a column in a ring.
"""

from __future__ import annotations

import torch

from mixchat.kernels.cpu.trellis_units import RING
from mixchat.weights.matrix.gptq import (
    corrected,
    feedback_of,
    mean_squares,
    round_with_fitted_scales,
)
from mixchat.weights.matrix.quant_type import BLOCKSIZE, Inputs
from mixchat.weights.matrix.trellis_search import nearest
from mixchat.weights.matrix.trellis_table import Table, bytes_of_scales, scales_of_bytes

# Words, int64 [R / 64, C, W], and scales as bytes [R, C / 64].
Rounded = tuple[torch.Tensor, torch.Tensor]
_FACTORS = torch.logspace(-0.2, 0.52, 22)  # tried, times the root of a block's mean square
_TINY = 1e-38
_PIECE = 2**22  # weights in one pass


def round_plainly(table: Table, weight: torch.Tensor) -> Rounded:
    """Return the words of weight [R, C], fp32, for the least error of the weights."""
    scales = _scales(table, weight, torch.ones(weight.shape[1]))
    wide = scales_of_bytes(scales).repeat_interleave(BLOCKSIZE, -1)
    size = max(1, _PIECE // (RING * weight.shape[1])) * RING
    pieces = zip(torch.split(weight, size), torch.split(wide, size), strict=True)
    return torch.cat([_rounded(table, *piece)[0] for piece in pieces]), scales


def round_for_inputs(table: Table, weight: torch.Tensor, inputs: Inputs) -> Rounded:
    """Return the words of weight [R, C], fp32, for the least error of products with inputs."""
    feedback = feedback_of(inputs.fit)
    weight = corrected(weight, feedback, inputs)
    scales = _scales(table, weight, mean_squares(inputs.fit))
    words = torch.empty(len(weight) // RING, weight.shape[1], table.bits, dtype=torch.int64)

    def rounded(index: int, column: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        column_words, values = _rounded(table, column.unsqueeze(-1), scale.unsqueeze(-1))
        words[:, index] = column_words[:, 0]
        return values.squeeze(-1)

    fitted = round_with_fitted_scales(
        weight,
        scales_of_bytes(scales),
        rounded,
        feedback,
        lambda scales: scales_of_bytes(bytes_of_scales(scales)),
    )
    return words, bytes_of_scales(fitted)


def _rounded(
    table: Table, weight: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return words [R / 64, n, W] and values [R, n] of weights [R, n] with these scales."""
    rows, columns = weight.shape
    # The largest scale of a ring counts as 1, so that squares of scales stay in range.
    relative = scale.view(-1, RING, columns)
    relative = relative / relative.amax(1, keepdim=True).clamp(min=_TINY)
    x = (weight / scale.where(scale != 0, 1)).view(relative.shape)
    words, numbers = nearest(table, _in_rings(x), _in_rings(relative.square()))
    values = numbers.view(-1, columns, RING).transpose(1, 2).reshape(rows, columns) * scale
    return words.view(-1, columns, table.bits), values


def _in_rings(x: torch.Tensor) -> torch.Tensor:
    """Return numbers [R / 64, 64, n] as [R / 64 * n, 64]."""
    return x.transpose(1, 2).reshape(-1, RING)


def _scales(table: Table, weight: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """Return the bytes of the scales [R, C / 64]. `importance` [C] is of squared errors."""
    blocks = weight.view(len(weight), -1, BLOCKSIZE)
    relative = (importance / importance.mean()).view(-1, BLOCKSIZE)
    sums, mean = relative.sum(-1), blocks.square().mean(-1).sqrt()  # [C / 64], [R, C / 64]
    magnitudes, largest = blocks.abs(), float(table.levels[-1])
    best, result = torch.full_like(mean, torch.inf), bytes_of_scales(mean)
    for factor in _FACTORS:
        trial = bytes_of_scales(mean / table.sigma * factor)
        scale = scales_of_bytes(trial)
        beyond = (magnitudes - (largest * scale).unsqueeze(-1)).clamp_(min=0).square_()
        clipped = torch.einsum("rbc,bc->rb", beyond, relative)
        error = table.error * scale.square() * sums + clipped
        better = error < best
        best = torch.where(better, error, best)
        result = torch.where(better, trial, result)
    return result
