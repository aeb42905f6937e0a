"""Tensors as bitsandbytes saves them, and what they stand for."""

import json
from typing import Any

import bitsandbytes.functional as bnb
import torch

from mixchat.weights.matrix.bnb_format import read_matrix
from mixchat.weights.matrix.nf4 import Quantized4bit

NAME = "model.layers.0.block_sparse_moe.experts.3.w1.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"
ROWS, COLUMNS = 96, 192
Tensors = dict[str, torch.Tensor]


def quantized(
    kind: str = "nf4",
    nested: bool = True,
    storage: torch.dtype = torch.uint8,
    shape: tuple[int, int] = (ROWS, COLUMNS),
    dtype: torch.dtype = torch.bfloat16,
    blocksize: int = 64,
    seed: int = 0,
) -> tuple[Tensors, torch.Tensor]:
    """The tensors that bitsandbytes saves, and the fp32 matrix that it makes of them."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    codes, state = bnb.quantize_4bit(
        weight,
        blocksize=blocksize,
        compress_statistics=nested,
        quant_type=kind,
        quant_storage=storage,
    )
    tensors = {NAME: codes}
    for part, tensor in state.as_dict(packed=True).items():
        tensors[f"{NAME}.{part}"] = tensor
    return tensors, oracle(tensors)


def oracle(tensors: Tensors, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return the matrix that bitsandbytes itself reads from saved tensors.

    As one row: its AVX512 kernel lets a block begin with each row, which is wrong for many shapes.
    """
    parts = {name.removeprefix(f"{NAME}."): t for name, t in tensors.items() if name != NAME}
    state = bnb.QuantState.from_dict(parts, device=torch.device("cpu"))
    shape, state.shape, state.dtype = state.shape, torch.Size((1, state.shape.numel())), dtype
    return bnb.dequantize_4bit(tensors[NAME], state).view(shape)


def read(tensors: Tensors, shape: tuple[int, int] = (ROWS, COLUMNS)) -> Quantized4bit:
    rows, columns = shape
    return read_matrix(NAME, tensors.__getitem__, tensors, rows=rows, columns=columns)


def description(raw: Any) -> torch.Tensor:
    text = raw if isinstance(raw, bytes) else json.dumps(raw).encode()
    return torch.tensor(list(text), dtype=torch.uint8)


def described(tensors: Tensors) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads(bytes(tensors[STATE].tolist()))
    return raw
