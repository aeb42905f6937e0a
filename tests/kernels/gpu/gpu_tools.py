"""Runs kernels on a card if there is one, and makes tensors of a KV cache as they read them.

Without a card, kernels may touch the tensors that they are given alone, and what has addresses in a
table of `addresses_of`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from triton_interpreter import confined_to

from mixchat.kernels.gpu.kv_store import KVTensors

# The device on which kernels run, if tests/gpu.sh names one. It may be the CPU, with copies, too.
CARD = os.environ.get("MIXCHAT_TEST_GPU")

# Tensors whose addresses are in tables, by an address and its bytes.
_addressed: dict[int, int] = {}


def start_confined(
    kernel: Any, grid: Any, arguments: tuple[Any, ...], constants: dict[str, Any]
) -> None:
    """Run a kernel by the interpreter, which refuses what is outside of its tensors."""
    tensors = [item for item in arguments if isinstance(item, torch.Tensor)]
    with confined_to([*map(_extent, tensors), *_addressed.items()]):
        kernel[grid](*arguments, **constants)


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the address of a tensor, and the bytes up to its last number."""
    if not tensor.numel():
        return tensor.data_ptr(), 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.data_ptr(), tensor.itemsize * (1 + sum((n - 1) * step for n, step in steps))


def start_on_card(
    kernel: Any, grid: Any, arguments: tuple[Any, ...], constants: dict[str, Any]
) -> None:
    """Run a kernel on the card with copies of tensors in RAM, and bring back what it wrote.

    So tests have all their tensors in RAM. Addresses in a table have to be those of the card.
    """
    memories: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def on_card(item: Any) -> Any:
        if not isinstance(item, torch.Tensor):
            return item
        storage = item.untyped_storage()
        if storage.data_ptr() not in memories:
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)
            memories[storage.data_ptr()] = whole, whole.to(CARD, copy=True)
        memory = memories[storage.data_ptr()][1]
        numbers = memory[: len(memory) // item.itemsize * item.itemsize].view(item.dtype)
        return numbers.as_strided(item.shape, item.stride(), item.storage_offset())

    kernel[grid](*map(on_card, arguments), **constants)
    for whole, copy in memories.values():
        whole.copy_(copy)


@contextmanager
def addresses_of(*tensors: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield a table of the addresses of tensors, whose memory is the card's until the end."""
    copies = [tensor if CARD is None else tensor.to(CARD, copy=True) for tensor in tensors]
    _addressed.clear()
    _addressed.update(map(_extent, copies))
    yield torch.tensor([copy.data_ptr() for copy in copies])
    _addressed.clear()
    for tensor, copy in zip(tensors, copies, strict=True):
        tensor.copy_(copy)


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
