"""The composition root: builds an `Engine` out of a kept model, a device and a budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mixchat.engine.generate import PREFILL_CHUNK, Engine
from mixchat.engine.kv_cache import new_cache
from mixchat.engine.model import Attention, Block, Model, RMSNorm
from mixchat.engine.moe import SparseMoE
from mixchat.engine.prompt_cache import identity_of
from mixchat.engine.rope import RotaryEmbedding
from mixchat.errors import UsageError
from mixchat.experts.policies import DEFAULT_POLICY
from mixchat.experts.runner import ExpertRunner
from mixchat.experts.trace import TraceWriter, TracingRunner
from mixchat.kernels import attention, rows
from mixchat.kernels.pages import Bits
from mixchat.loading.tiers import build_experts
from mixchat.planning.expectation import predicted
from mixchat.planning.fitting import FreeMemory, context_size, demand_of, place
from mixchat.planning.thread_count import settle_threads
from mixchat.quantities import MemoryBudget
from mixchat.weights.format.blueprint import Blueprint
from mixchat.weights.format.installed_model import InstalledModel
from mixchat.weights.matrix.linear import DenseLinear, Linear
from mixchat.weights.models import models_dir


@dataclass(frozen=True)
class LoadOptions:
    """How to load. None chooses from what the machine has.

    host_memory: RAM for experts; device_memory: all that may be taken on a GPU; cache_policy: one
    of `policies.POLICIES`; kv_bits: those of a number in the KV cache, None for the model's own;
    exact_prompts: compute the tokens of a prompt to the bit as decoded ones; trace: a file that
    gets the routing; note: gets what a person should hear of.
    """

    host_memory: MemoryBudget | None = None
    device_memory: MemoryBudget | None = None
    context_size: int | None = None
    kv_bits: Bits | None = None
    exact_prompts: bool = False
    device: str | None = None
    cache_policy: str = DEFAULT_POLICY
    trace: Path | None = None
    note: Callable[[str], object] = lambda text: None


def load_engine(directory: Path, options: LoadOptions) -> Engine:
    """Build the engine of a kept model.

    The experts stay in their files until they are used.

    Raises `CheckpointError` where the model is damaged, `UsageError` where an option cannot be,
    `ResourceError` where it does not fit.
    """
    device = choose_device(options.device)
    kept = InstalledModel(directory)
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
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # streams and events are those of the current one
    return device


def _assemble(kept: InstalledModel, options: LoadOptions, device: torch.device) -> Engine:
    config, stored = kept.config, kept.blueprint
    exact = options.exact_prompts
    used = stored.computed_on(device, exact=exact)
    dtype = stored.quantization.dtype
    context = context_size(config, options.context_size)
    demand = demand_of(stored, context, options.kv_bits)
    placement = place(demand, FreeMemory.now(device), options.host_memory, options.device_memory)
    settle_threads(stored)
    runner: ExpertRunner
    runner, fetcher = build_experts(
        kept, placement, device, options.cache_policy, options.note, exact=exact
    )
    if options.trace is not None:
        runner = TracingRunner(runner, _trace_writer(options.trace, kept))
    model = _build_model(kept, used, runner, context, device)
    return Engine(
        model,
        new_cache(config, context, dtype, device, options.kv_bits),
        fetcher,
        prefill_chunk=1 if exact and not keeps_tokens_apart(used, device) else PREFILL_CHUNK,
        exact_prompts=exact,
        expected=lambda: predicted(
            stored, kept.directory, device, replace(placement, slots=fetcher.slots)
        ),
        note=options.note,
        identity=identity_of(kept.manifest),
        name=_name_of(kept.directory),
    )


def _name_of(directory: Path) -> str:
    """The name of an installed model, as commands take it; the path of one elsewhere."""
    return directory.name if directory.parent == models_dir() else str(directory)


def keeps_tokens_apart(used: Blueprint, device: torch.device) -> bool:
    """Return whether a token's numbers have the same bits in a prompt's chunk of any size as alone.

    On a CPU the kernels can compute so. Elsewhere a prompt has to be read token by token for that.
    """
    if device.type != "cpu" or not attention.available():
        return False
    matrices = (used.expert.w13, used.expert.w2, used.qkv(0), used.o(0))
    return rows.takes(used.quantization.dtype, used.config.hidden_size) and all(
        matrix.keeps_tokens_apart for matrix in matrices
    )


def _trace_writer(path: Path, kept: InstalledModel) -> TraceWriter:
    config = kept.config
    return TraceWriter(
        path,
        kept.manifest.source.repo,
        config.num_hidden_layers,
        config.num_local_experts,
        config.num_experts_per_tok,
    )


def _build_model(
    kept: InstalledModel, used: Blueprint, runner: ExpertRunner, context: int, device: torch.device
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
    head: Linear = DenseLinear(embedding, exact=used.exact)
    if stored.head is not None and used.head is not None:
        head = kept.linear(stored.head, used.head, device)
    norm = RMSNorm(kept.tensor(stored.norm).to(device), config.rms_norm_eps)
    blocks = [block(layer) for layer in range(config.num_hidden_layers)]
    return Model(config, embedding, blocks, norm, head)
