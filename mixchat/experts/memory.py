"""How much memory a device has free, and how to keep some of it from being moved."""

from __future__ import annotations

from typing import Any

import torch

from mixchat import machine


def free_memory(device: torch.device) -> int:
    """Bytes that can be taken on the device without pushing anything out."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return machine.free_memory()


def page_lock(block: torch.Tensor) -> None:
    """Pin the pages of a tensor in RAM, so that copies to a GPU run at the bus's speed.

    `torch.empty(pin_memory=True)` would round 24 GB up to 32. Where the system refuses (WSL2 limits
    it), the tensor stays as it is, and copies are slower but right.
    """
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    runtime.cudaHostRegister(block.data_ptr(), block.nbytes, 0)
