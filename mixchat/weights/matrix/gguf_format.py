"""Reads matrices in the types of llama.cpp's GGUF files. All of it is untrusted.

A row is a row of blocks, such as 256 weights of Q4_K in 144 bytes. The package gguf decodes the
blocks of each type.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mixchat.base.errors import CheckpointError
from mixchat.base.safetensors import TensorSpec
from mixchat.weights.matrix.encode import each_in_threads
from mixchat.weights.matrix.mxfp4 import LARGEST_SCALE, MXFP4
from mixchat.weights.matrix.nf4 import Quantized4bit, two_a_byte

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PIECE = 2**18  # weights, whose temporary arrays fit in the caches


@dataclass(frozen=True)
class GgufSpec(TensorSpec):
    """A tensor in blocks. `dtype` and `shape` are those of its bytes."""

    ggml_type: str  # by ggml's name

    @property
    def weights(self) -> tuple[int, ...]:
        """Return the shape, counted in weights."""
        block, nbytes = _block(self.ggml_type)
        return (*self.shape[:-1], self.shape[-1] // nbytes * block)


def tensor_spec(name: str, number: int, shape: tuple[int, ...], where: str) -> TensorSpec:
    """Return the spec of a tensor of this shape in weights, in ggml's type `number`.

    Raises `CheckpointError` for another type than those that can be read.
    """
    from gguf import GGMLQuantizationType

    try:
        ggml_type = GGMLQuantizationType(number).name
    except ValueError:
        ggml_type = f"number {number}"
    if ggml_type in _FLOATS:
        return TensorSpec(name, _FLOATS[ggml_type], shape)
    if not _can_be_read(ggml_type):
        raise CheckpointError(
            f"{where}: {name!r:.80} has the type {ggml_type}, which cannot be read",
            hint="Choose another file of the repository, such as Q4_K_M or Q8_0.",
        )
    block, nbytes = _block(ggml_type)
    if not shape or shape[-1] % block:
        raise CheckpointError(
            f"{where}: the rows of {name!r:.80} are not whole blocks of {ggml_type}"
        )
    return GgufSpec(name, torch.uint8, (*shape[:-1], shape[-1] // block * nbytes), ggml_type)


def dense(spec: GgufSpec, raw: torch.Tensor) -> torch.Tensor:
    """Return the weights in bf16. They can hold infinity and NaN."""
    from gguf import GGMLQuantizationType

    weights = torch.empty(spec.weights, dtype=torch.bfloat16)
    rows = weights.view(-1, weights.shape[-1])
    ggml_type = GGMLQuantizationType[spec.ggml_type]

    def decode(raw: torch.Tensor, rows: torch.Tensor) -> None:
        from gguf import dequantize

        # Untrusted scales can be infinite or NaN. The caller checks the weights.
        with np.errstate(all="ignore"):
            rows.copy_(torch.from_numpy(dequantize(raw.numpy(), ggml_type)))

    size = max(1, _PIECE // rows.shape[1])
    each_in_threads(decode, (raw.view(len(rows), -1), size), (rows, size))
    return weights


def mxfp4(spec: GgufSpec, raw: torch.Tensor) -> Quantized4bit:
    """Return a matrix [rows, columns] in MXFP4 without rounding it again. Raises `CheckpointError`.

    A block has its exponent and 16 bytes, with weights 0 to 15 in the low nibbles and 16 to 31 in
    the high ones.
    """
    rows, columns = spec.weights
    blocks = raw.view(-1, MXFP4.blocksize // 2 + 1)
    scales = blocks[:, 0].contiguous()
    pairs = blocks[:, 1:]
    if (largest := int(scales.max())) > LARGEST_SCALE:
        fault = "NaN" if largest == 255 else "a scale that is too large"
        raise CheckpointError(f"{spec.name}: holds {fault}")
    codes = two_a_byte(torch.cat((pairs & 0xF, pairs >> 4), dim=1))
    return Quantized4bit(MXFP4, rows, columns, codes.view(-1), scales)


def _block(ggml_type: str) -> tuple[int, int]:
    """Return the weights of a block, and its bytes."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[ggml_type]]
    return block, nbytes


@functools.cache
def _can_be_read(ggml_type: str) -> bool:
    from gguf import GGMLQuantizationType, dequantize

    number: Any = GGMLQuantizationType.__members__.get(ggml_type)
    if number is None:
        return False
    # The package has no public list of the types that it can decode.
    try:
        dequantize(np.zeros((1, _block(ggml_type)[1]), dtype=np.uint8), number)
    except NotImplementedError:
        return False
    return True
