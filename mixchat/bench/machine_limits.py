"""Measures the most that this machine can do, and counts the work of a token."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from mixchat.base import gpu
from mixchat.engine.sequence_cache import bytes_seen
from mixchat.kernels.cpu.pages import Bits
from mixchat.planning.bandwidth import MemoryMeter, ProductMeter, bus_bandwidth
from mixchat.planning.compute_speed import PromptProducts
from mixchat.planning.disk_speed import measure_disk
from mixchat.weights.format.blueprint import HEAD, Blueprint
from mixchat.weights.matrix.linear import LinearSpec
from mixchat.weights.matrix.quant_type import QuantType


@dataclass(frozen=True)
class Limits:
    """The limits of the device that computes."""

    memory: float  # bytes a second in reading
    # Operations a second of matrix products, in the form in which prompts are computed. On a CPU
    # that depends on the types of the model's weights.
    gemm: float


class LimitsMeter:
    """Measures the limits again and again, because they change."""

    def __init__(self, device: torch.device, blueprint: Blueprint, *, exact: bool = False) -> None:
        self._memory = MemoryMeter(device)
        self._products: ProductMeter | PromptProducts
        if gpu.is_gpu(device):
            self._products = ProductMeter(device)
        else:
            operations, dtype = operations_per_token(blueprint), blueprint.quantization.dtype
            self._products = PromptProducts(operations, dtype, exact=exact)

    def measure(self) -> Limits:
        """Return the best of a few tries."""
        return Limits(self._memory.rate(), self._products.rate())


def disk_bandwidth(directory: Path, block: int) -> float | None:
    """Return the bytes a second of reading blocks like experts, None if not measurable."""
    speed = measure_disk(directory, block, max(4 * block, 512_000_000), lambda: None, 0.25)
    return None if speed is None else speed.idle


def copy_bandwidth(device: torch.device, size: int) -> float | None:
    """Return bytes a second from page-locked RAM to a GPU, None for another device."""
    return bus_bandwidth(device, size) if gpu.is_gpu(device) else None


def bytes_per_token(blueprint: Blueprint, context: int, kv_bits: Bits | None) -> int:
    """Return the bytes that decoding a token reads after `context` other tokens."""
    config = blueprint.config
    experts = config.num_moe_layers * config.num_experts_per_tok * blueprint.mean_expert
    matrices = sum(matrix.nbytes for matrix in blueprint.shared_matrices.values())
    # A token needs one row of the embedding, unless the embedding is the head, too.
    tied = 0 if blueprint.head else blueprint.embedding.nbytes
    cache = bytes_seen(config, context, blueprint.quantization.dtype, kv_bits)
    return experts + matrices + tied + cache


def operations_per_token(blueprint: Blueprint) -> Counter[QuantType]:
    """Return the operations of a prompt's token in all matrices but the head, by their type."""
    operations: Counter[QuantType] = Counter()

    def count(matrix: LinearSpec, times: int = 1) -> None:
        # A multiplication and an addition are two operations.
        operations[matrix.quant_type] += 2 * times * matrix.rows * matrix.columns

    for layer in range(blueprint.config.num_moe_layers):
        form = blueprint.expert_of(layer)
        for matrix in (form.gate_up, form.down):
            count(matrix, blueprint.config.num_experts_per_tok)
    for name, matrix in blueprint.shared_matrices.items():
        if name != HEAD:  # only the last token of a prompt passes the head
            count(matrix)
    return operations
