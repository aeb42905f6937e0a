"""Reads matrices that a checkpoint holds in MXFP4, as gpt-oss' experts are published.

In place of a stack X [E, in, out] of matrices (or of its fourth part `X[3]`, which has no E):

    X_blocks   U8 [E, out, in / 32, 16], two codes a byte, the even column's in the low nibble
    X_scales   U8 [E, out, in / 32], the exponent of each block of 32 columns

So rows and columns belong to the matrix of the product, [out, in], and X is its transpose. All of
it is untrusted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch

from mixchat.base.errors import CheckpointError
from mixchat.base.safetensors import TensorSpec, split_part
from mixchat.weights.matrix.mxfp4 import LARGEST_SCALE, MXFP4
from mixchat.weights.matrix.nf4 import Quantized4bit

_COMPONENTS = ("_blocks", "_scales")


def component_names(name: str) -> tuple[str, str]:
    """Return the names of the codes and scales of a tensor, or of a part of it."""
    stack, index = split_part(name)
    suffix = "" if index is None else f"[{index}]"
    codes, scales = (f"{stack}{component}{suffix}" for component in _COMPONENTS)
    return codes, scales


def is_quantized(name: str, available: Collection[str]) -> bool:
    """Return whether the names say that the matrix is in MXFP4."""
    stack, _ = split_part(name)
    components = (f"{stack}{component}" for component in _COMPONENTS)
    return stack not in available and any(component in available for component in components)


def component_specs(name: str, shape: tuple[int, ...]) -> tuple[TensorSpec, TensorSpec]:
    """Return the codes and scales of a stack of this shape. Raises `CheckpointError`."""
    if len(shape) != 3:
        raise CheckpointError(f"{name}: in MXFP4, but no stack of matrices")
    experts, columns, rows = shape
    if columns % MXFP4.blocksize:
        raise CheckpointError(f"{name}: {columns} columns in MXFP4 are not whole blocks of 32")
    scales = (experts, rows, columns // MXFP4.blocksize)
    codes_name, scales_name = component_names(name)
    codes = TensorSpec(codes_name, torch.uint8, (*scales, MXFP4.blocksize // 2))
    return codes, TensorSpec(scales_name, torch.uint8, scales)


def read_matrix(name: str, read: Callable[[str], torch.Tensor]) -> Quantized4bit:
    """Read a matrix [out, in], whose shape was checked. Raises `CheckpointError`."""
    codes, scales = map(read, component_names(name))
    if (largest := int(scales.max())) > LARGEST_SCALE:
        fault = "NaN" if largest == 255 else "a scale that is too large"
        raise CheckpointError(f"{component_names(name)[1]}: holds {fault}")
    rows, blocks = scales.shape
    # Installed models have the even column in the high nibble, as bitsandbytes does.
    flat = codes.reshape(-1)
    return Quantized4bit(
        MXFP4, rows, blocks * MXFP4.blocksize, flat << 4 | flat >> 4, scales.view(-1)
    )
