"""Reads matrices that a checkpoint holds in FP8 with a scale for each tile of 128 rows and columns.

X            F8_E4M3 [out, in]
X_scale_inv  [out / 128, in / 128], rounded up, what the numbers of a tile are multiplied with
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch

TILE = 128
FP8 = torch.float8_e4m3fn


def component_names(name: str) -> tuple[str, str]:
    """Return the names of the numbers and of the scales of a matrix."""
    return name, f"{name}_scale_inv"


def is_quantized(name: str, available: Collection[str]) -> bool:
    """Return whether the names say that the matrix is in FP8."""
    return component_names(name)[1] in available


def scales_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the scales of a matrix."""
    return tuple(-(-length // TILE) for length in shape)


def read_matrix(name: str, read: Callable[[str], torch.Tensor]) -> torch.Tensor:
    """Read a matrix [out, in], whose shape was checked, as bf16."""
    numbers, scales = map(read, component_names(name))
    matrix = torch.empty(numbers.shape, dtype=torch.bfloat16)
    # A band of 128 rows at a time, which bounds the memory in fp32.
    bands = zip(torch.split(numbers, TILE), scales.float(), torch.split(matrix, TILE), strict=True)
    for band, tile_scales, target in bands:
        target.copy_(band.float() * tile_scales.repeat_interleave(TILE)[: band.shape[1]])
    return matrix
