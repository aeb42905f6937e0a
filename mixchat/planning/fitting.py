"""What a model asks of memory, and where it goes: the same for planning and for loading."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mixchat.context import Context
from mixchat.engine.kv_cache import cache_bytes
from mixchat.errors import ResourceError, UsageError
from mixchat.experts.memory import CPU, free_on
from mixchat.experts.placement import Demand, Placement, place_on_cpu, place_on_gpu
from mixchat.kernels.pages import Bits
from mixchat.machine import tightest_memory_limit
from mixchat.model_config import ModelConfig
from mixchat.quantities import MemoryBudget
from mixchat.weights.format.blueprint import Blueprint


@dataclass(frozen=True)
class FreeMemory:
    """Bytes that can be taken: in RAM, and on the GPU that computes; None where the CPU does.

    limit: as `machine.tightest_memory_limit` returns it.
    """

    host: int
    device: int | None = None
    limit: str | None = None

    @classmethod
    def now(cls, device: torch.device) -> FreeMemory:
        """What can be taken on this machine, where `device` computes."""
        on_device = None if device == CPU else free_on(device)
        return cls(free_on(CPU), on_device, tightest_memory_limit())


def context_size(config: ModelConfig, wanted: int | None) -> int:
    """Tokens of the context; None chooses. Raises `UsageError` for what the model cannot do."""
    return Context.of(config, wanted).tokens


def demand_of(blueprint: Blueprint, context: int, kv_bits: Bits | None = None) -> Demand:
    """What the model asks for with a context of so many tokens."""
    return Demand(
        shared=blueprint.shared_size,
        context=cache_bytes(blueprint.config, context, blueprint.quantization.dtype, kv_bits),
        expert=blueprint.expert.stride,
        experts=blueprint.expert_count,
    )


def place(
    demand: Demand,
    free: FreeMemory,
    host_memory: MemoryBudget | None,
    device_memory: MemoryBudget | None,
) -> Placement:
    """Where the experts go. Raises `UsageError` and `ResourceError` as `experts/placement.py`."""
    if free.device is not None:
        return place_on_gpu(demand, free.device, free.host, device_memory, host_memory)
    if device_memory is not None:
        raise UsageError("--device-memory is for a GPU; --host-memory sets what the CPU uses")
    try:
        return place_on_cpu(demand, free.host, host_memory)
    except ResourceError as error:
        if free.limit is None:
            raise
        hint = f"A limit from outside allows no more ({free.limit}): raise it. {error.hint or ''}"
        raise ResourceError(str(error), hint=hint.strip()) from None
