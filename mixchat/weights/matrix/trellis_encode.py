"""Rounds a matrix to the numbers of a trellis on the CPU, with searched scales.

A number errs about as much wherever it lies, up to the largest number of the table. So a block's
scale is chosen for the least sum of two errors: the mean error of numbers times the square of the
scale, for each weight, and the squares of what larger weights have beyond the largest number.

R = rows and C = columns, whole rings and blocks of 64 weights.
"""

from __future__ import annotations

import torch

from mixchat.weights.matrix.encode import each_in_threads
from mixchat.weights.matrix.gptq import inverse_factor, mean_squares, round_columns
from mixchat.weights.matrix.quant_type import BLOCKSIZE
from mixchat.weights.matrix.trellis_search import nearest
from mixchat.weights.matrix.trellis_table import RING, Table, bytes_of_scales, scales_of_bytes

Rounded = tuple[torch.Tensor, torch.Tensor]  # codes, one a byte [R, C], and scales [R, C / 64]
_FACTORS = torch.logspace(-0.2, 0.52, 22)  # tried, times the root of a block's mean square
_TINY = 1e-38


def round_plainly(table: Table, weight: torch.Tensor) -> Rounded:
    """Return the codes of weight [R, C], fp32, for the least error of the weights."""
    scales = _scales(table, weight, torch.ones(weight.shape[1]))
    each = scales_of_bytes(scales).repeat_interleave(BLOCKSIZE, -1)
    codes = torch.empty(weight.shape, dtype=torch.uint8)

    def fill(codes: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> None:
        codes.copy_(_round_rings(table, weight, scale)[0])

    rings = (torch.split(tensor, RING) for tensor in (codes, weight, each))
    each_in_threads(fill, *rings)
    return codes, scales


def round_for_inputs(table: Table, weight: torch.Tensor, inputs: torch.Tensor) -> Rounded:
    """Return the codes of weight [R, C], fp32, for the least error of products with inputs."""
    scales = _scales(table, weight, mean_squares(inputs))

    def rounded(column: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes, values = _round_rings(table, column.unsqueeze(-1), scale.unsqueeze(-1))
        return codes.squeeze(-1), values.squeeze(-1)

    flat = scales_of_bytes(scales).view(-1)
    codes = round_columns(weight, flat, rounded, inverse_factor(inputs))
    return codes.view(weight.shape), scales


@torch.inference_mode()  # a caller's holds for its own thread only
def _round_rings(table: Table, weight: torch.Tensor, scale: torch.Tensor) -> Rounded:
    """Return codes and values [R, n] of weights [R, n] with these scales."""
    (rows, columns), x = weight.shape, weight / scale.where(scale != 0, 1)
    # The same factor for all rows of a ring keeps the squares of scales in range.
    relative = scale.view(-1, RING, columns)
    relative = relative / relative.amax(1, keepdim=True).clamp(min=_TINY)
    as_rings = (
        t.reshape(-1, RING, columns).transpose(1, 2).reshape(-1, RING)
        for t in (x, relative.square())
    )
    codes, numbers = nearest(table, *as_rings)
    in_rows = (
        t.view(-1, columns, RING).transpose(1, 2).reshape(rows, columns) for t in (codes, numbers)
    )
    return next(in_rows), next(in_rows) * scale


def _scales(table: Table, weight: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """Return the bytes of the scales [R, C / 64]. `importance` [C] is of squared errors."""
    blocks = weight.unflatten(-1, (-1, BLOCKSIZE))
    each = (importance / importance.mean()).view(-1, BLOCKSIZE)
    sums, mean = each.sum(-1), blocks.square().mean(-1).sqrt()  # [C / 64], [R, C / 64]
    magnitudes, largest = blocks.abs(), float(table.levels[-1])
    best, result = torch.full_like(mean, torch.inf), bytes_of_scales(mean)
    for factor in _FACTORS:
        trial = bytes_of_scales(mean / table.sigma * factor)
        scale = scales_of_bytes(trial)
        beyond = (magnitudes - (largest * scale).unsqueeze(-1)).clamp_(min=0).square_()
        error = table.error * scale.square() * sums + torch.einsum("rbc,bc->rb", beyond, each)
        better = error < best
        best = torch.where(better, error, best)
        result = torch.where(better, trial, result)
    return result
