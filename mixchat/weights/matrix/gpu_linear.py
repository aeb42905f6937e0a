"""A matrix on a GPU as a linear map. Import this only if a GPU computes: it imports Triton.

R = rows (out features), C = columns (in features).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch.nn import functional

from mixchat.kernels.gpu.codes import level_table
from mixchat.kernels.gpu.dequantize import dequantize
from mixchat.kernels.gpu.product import MANY, Form, Matrix, product
from mixchat.weights.matrix.linear import TYPES, LinearSpec
from mixchat.weights.matrix.quant_type import Linear, QuantType

_PIECE = 2**25  # weights that are decoded at once: 64 MiB in 16 bits


class GpuLinear:
    """The map y = x W^T + b. x has the type of a dense W."""

    def __init__(self, matrix: Matrix) -> None:
        self.matrix = matrix

    def __call__(self, x: torch.Tensor, *, exact: bool = False) -> torch.Tensor:
        """Return y [..., R] of x [..., C].

        With `exact`, or for a few rows, each row of y has the bits that it has alone.
        """
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        if exact or len(rows) <= MANY:
            sums = [product(some, self.matrix).sum(0) for some in torch.split(rows, MANY)]
            result = torch.cat(sums).to(x.dtype)
        else:
            result = self._by_torch(rows)
        return result.view(*x.shape[:-1], self.matrix.form.rows)

    def _by_torch(self, x: torch.Tensor) -> torch.Tensor:
        form = self.matrix.form
        bias = self.matrix.bias
        if form.quant_type == "none":
            result = functional.linear(x, self.matrix.codes.view(form.rows, form.columns))
            return result if bias is None else result.add_(bias)
        result = x.new_empty(len(x), form.rows)
        band = form.tile.band
        count = max(1, _PIECE // (form.columns * band)) * band
        weight = x.new_empty(min(count, form.rows), form.columns)
        for start in range(0, form.rows, count):
            piece = weight[: form.rows - start]
            dequantize(self.matrix, piece, start)
            torch.matmul(x, piece.T, out=result[:, start : start + len(piece)])
        return result if bias is None else result.add_(bias)


def as_gpu(linear: Linear) -> GpuLinear:
    """Return a map that is known to be a `GpuLinear`."""
    assert isinstance(linear, GpuLinear)
    return linear


def build_on_gpu(spec: LinearSpec, tensors: Sequence[torch.Tensor]) -> GpuLinear | None:
    """Return the map [..., C] to [..., R] over tensors on a GPU, None if no kernel takes them.

    The tensors are used in place. So they have to begin on a boundary of 16 bytes.
    """
    form = form_of(spec)
    levels = levels_on(spec.quant_type, tensors[0].device)
    if not form.is_supported:
        return None
    bias = tensors[-1] if spec.bias else None
    if spec.quant_type == "none":
        return GpuLinear(Matrix(form, tensors[0], bias=bias))
    return GpuLinear(Matrix(form, tensors[1], tensors[0], levels, bias))


def form_of(spec: LinearSpec) -> Form:
    """Return the form of a matrix as kernels know it."""
    wide = spec.dtype == torch.float32
    return Form(spec.quant_type, spec.rows, spec.stored_rows, spec.columns, wide)


@functools.cache
def levels_on(quant_type: QuantType, device: torch.device) -> torch.Tensor | None:
    """Return the `level_table` [n] of a type, or None if its codes are numbers themselves."""
    levels = getattr(TYPES[quant_type], "levels", None)
    return None if levels is None else level_table(levels).to(device)
