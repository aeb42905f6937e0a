"""Builds a matrix with the kernels of the device that holds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from mixchat.base import gpu
from mixchat.weights.matrix.linear import LinearSpec
from mixchat.weights.matrix.quant_type import Linear


def build_linear(spec: LinearSpec, tensors: Sequence[torch.Tensor]) -> Linear:
    """Return the map [..., C] to [..., R] over tensors, as `LinearSpec.build` does on a CPU."""
    if gpu.is_gpu(tensors[0].device):
        # Triton is imported only if a GPU computes.
        from mixchat.weights.matrix.gpu_linear import build_on_gpu

        linear = build_on_gpu(spec, tensors)
        if linear is not None:
            return linear
    return spec.build(tensors)


def build_parts(spec: LinearSpec, tensors: Sequence[torch.Tensor], count: int) -> list[Linear]:
    """Return the maps of `count` matrices [R / count, C], one above the other in these tensors."""
    assert not spec.bias
    own = replace(spec, rows=spec.rows // count)
    assert spec.rows == spec.stored_rows == count * own.stored_rows
    parts = zip(*(torch.chunk(tensor, count) for tensor in tensors), strict=True)
    return [build_linear(own, own_tensors) for own_tensors in parts]
