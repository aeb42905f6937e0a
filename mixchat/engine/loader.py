"""The composition root: builds an `Engine` out of a kept model, a device and a budget."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from mixchat.engine.generate import Engine
from mixchat.engine.kv_cache import KVCache
from mixchat.engine.model import Attention, Block, Model, RMSNorm
from mixchat.engine.moe import SparseMoE
from mixchat.engine.rope import RotaryEmbedding
from mixchat.errors import UsageError
from mixchat.experts.cache import LRUCache
from mixchat.experts.memory import free_memory, page_lock
from mixchat.experts.placement import place
from mixchat.experts.runner import CachedExpertRunner, ExpertRunner
from mixchat.experts.store import DiskSource, ExpertSource, ExpertStore, HostSource
from mixchat.settings import MemoryBudget
from mixchat.weights import nf4
from mixchat.weights.blueprint import Blueprint
from mixchat.weights.checkpoint import KeptModel
from mixchat.weights.linear import DenseLinear, Linear

DEFAULT_CONTEXT = 8192  # tokens; Mixtral can do 32768, at 128 KiB each
# Bytes. A matrix of such an expert takes some 50 microseconds: threads gain little from sharing it,
# and lose ten times as much in waiting for each other where another program wants a core too.
SMALL_EXPERT = 4_000_000


@dataclass(frozen=True)
class LoadOptions:
    """How to load. None chooses from what the machine has."""

    expert_memory: MemoryBudget | None = None
    context_size: int | None = None
    device: str | None = None


def load_engine(directory: Path, options: LoadOptions) -> Engine:
    """Build the engine of a kept model.

    On a CPU the experts stay in their files until they are used; for a GPU they are first read into
    RAM, where they fit.

    Raises `CheckpointError` where the model is damaged, `UsageError` where an option cannot be,
    `ResourceError` where it does not fit.
    """
    device = choose_device(options.device)
    kept = KeptModel(directory)
    try:
        return _assemble(kept, options, device)
    except BaseException:
        kept.close()
        raise


def choose_device(name: str | None) -> torch.device:
    """The named device, else the first GPU, else the CPU. Raises `UsageError`."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name!r} is not a device; use cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name!r} is not supported; use cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {name!r}: torch sees {torch.cuda.device_count()} GPUs here")
    return device


def _assemble(kept: KeptModel, options: LoadOptions, device: torch.device) -> Engine:
    config, stored = kept.config, kept.blueprint
    packed = device.type == "cpu" and nf4.has_packed_kernel()
    used = stored.in_layout("cpu-packed" if packed else "bitsandbytes")
    dtype = stored.quantization.dtype
    context = _context_size(options.context_size, config.max_position_embeddings)
    placement = place(
        free=free_memory(device),
        shared=stored.shared_size,
        context=KVCache.nbytes(config, context, dtype),
        expert=stored.expert.stride,
        experts=stored.expert_count,
        budget=options.expert_memory,
    )
    if stored.expert.nbytes < SMALL_EXPERT:
        torch.set_num_threads(1)
    store = ExpertStore(
        _source(kept, device),
        placement.slots,
        stored=stored.expert,
        used=used.expert,
        device=device,
    )
    runner = CachedExpertRunner(LRUCache(placement.slots), store)
    model = _build_model(kept, used, runner, context, device)
    return Engine(model, KVCache(config, context, dtype, device), runner.stats)


def _context_size(wanted: int | None, largest: int) -> int:
    if wanted is None:
        return min(DEFAULT_CONTEXT, largest)
    if not 1 < wanted <= largest:
        raise UsageError(f"--ctx-size {wanted}: this model can do 2 to {largest} tokens")
    return wanted


def _source(kept: KeptModel, device: torch.device) -> ExpertSource:
    """RAM over the file for a GPU, where all experts fit it; else the file itself."""
    if device.type == "cpu":
        return DiskSource(kept)
    experts = kept.blueprint.expert_count * kept.blueprint.expert.stride
    if experts < 0.9 * free_memory(torch.device("cpu")):
        return HostSource(kept, page_lock)
    return DiskSource(kept, page_lock)


def _build_model(
    kept: KeptModel, used: Blueprint, runner: ExpertRunner, context: int, device: torch.device
) -> Model:
    config, stored = kept.config, kept.blueprint
    dtype = stored.quantization.dtype
    rope = RotaryEmbedding(config.head_dim, config.rope_theta, context, dtype, device)

    def block(layer: int) -> Block:
        attention_norm, moe_norm = (
            RMSNorm(kept.tensor(spec).to(device), config.rms_norm_eps)
            for spec in stored.norms(layer)
        )
        qkv_proj = kept.linear(stored.qkv(layer), used.qkv(layer), device)
        o_proj = kept.linear(stored.o(layer), used.o(layer), device)
        gate = kept.tensor(stored.gate(layer)).to(device)
        return Block(
            attention_norm,
            Attention(layer, config, qkv_proj, o_proj, rope),
            moe_norm,
            SparseMoE(layer, gate, config.num_experts_per_tok, runner),
        )

    embedding = kept.tensor(stored.embedding).to(device)
    head: Linear = DenseLinear(embedding)
    if stored.head is not None and used.head is not None:
        head = kept.linear(stored.head, used.head, device)
    norm = RMSNorm(kept.tensor(stored.norm).to(device), config.rms_norm_eps)
    blocks = [block(layer) for layer in range(config.num_hidden_layers)]
    return Model(config, embedding, blocks, norm, head)
