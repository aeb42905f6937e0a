"""Tensors of a KV cache as the kernels for GPUs read them."""

from __future__ import annotations

import torch

from mixchat.kernels.gpu.kv_store import KVTensors


def kv_tensors(groups: int, room: int, width: int, dtype: torch.dtype, bits: int) -> KVTensors:
    numbers = torch.zeros(2, groups, room, width, dtype=torch.int8 if bits == 8 else dtype)
    return KVTensors(numbers, torch.zeros(2, groups, room) if bits == 8 else None)


def length_of(tokens: int) -> torch.Tensor:
    return torch.tensor([tokens], dtype=torch.int32)


def stored(tensors: KVTensors, position: int) -> torch.Tensor:
    """Return the key and the value of a token [2, G, h], fp32."""
    place = position % tensors.room
    numbers = tensors.numbers[:, :, place].float()
    return numbers if tensors.scales is None else numbers * tensors.scales[:, :, place, None]
