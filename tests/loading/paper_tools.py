"""Tiny models on GPUs on paper: what the tests of one GPU and of several have in common."""

import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from paper_runtime import PaperRuntime

from mixchat.base import gpu
from mixchat.base.options import LoadOptions, SamplingOptions
from mixchat.base.progress import Note
from mixchat.base.quantities import MemoryBudget
from mixchat.bench.synthetic import write_random
from mixchat.engine.generate import Engine
from mixchat.experts.placement import Demand
from mixchat.install.make.mix import mixed
from mixchat.loading.loader import load_engine
from mixchat.planning.fitting import FreeMemory, fit_model
from mixchat.planning.machine_speeds import GPUSpeeds, MachineSpeeds
from mixchat.weights.families.read_config import read_config
from mixchat.weights.format.blueprint import Blueprint, Quantization
from mixchat.weights.format.installed_model import InstalledModel


class Card:
    """Stands in for the runtime of GPUs on paper if there are real ones.

    A test is skipped when it asks for what only those on paper tell.
    """

    def __getattr__(self, name: str) -> Any:
        pytest.skip(f"only GPUs on paper have {name}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "devices" and value > gpu.count():
            pytest.skip(f"there are not {value} GPUs")
        if name not in ("devices", "interprets"):
            pytest.skip(f"only GPUs on paper have {name}")


GREEDY = SamplingOptions(temperature=0)
LAYERS, EXPERTS = 3, 12
PROMPT = list(range(5, 25))
PASSES = (PROMPT, [33], [60], [2])
CONTEXT = 64


def speeds(copy: float, expert: float) -> MachineSpeeds:
    """A machine that copies `copy` bytes a second, whose CPU takes `expert` s for an expert."""
    gpu = GPUSpeeds("GPU on paper", memory=8e10, bus=copy, compute=1e13, lanes=2e12)
    seconds = {1: expert, 8: 8 * expert}
    return MachineSpeeds(1e9, 1e9, seconds, 1e-3, (gpu,), time.time())


def settled(paper: PaperRuntime) -> tuple[int, int]:
    """The first GPU's bytes taken and the blocks locked, without engines of earlier tests."""
    looks: list[list[int]] = []
    # The threads that move experts end some time after their engine.
    while len(looks) < 6 or looks[-6:] != [looks[-1]] * 6:
        gc.collect()
        time.sleep(0.05)
        looks.append([*(memory.taken for memory in paper.memories), len(paper.locked)])
    now = looks[-1]
    return now[0], now[-1]


class Case(NamedTuple):
    """An installed model, and what the CPU computes with it."""

    directory: Path
    blueprint: Blueprint
    expected: torch.Tensor


Cases = Callable[[str], Case]  # by the kind of quantization

KINDS: dict[str, Quantization] = {
    "fp32": Quantization("none", dtype=torch.float32),
    "fp16": Quantization("none", dtype=torch.float16),
    "16 bits": Quantization("none"),
    "nf4": Quantization("nf4", attention="int8", head="int8"),
    "mxfp4": Quantization("mxfp4", attention="int8", head="int8"),
    "trellis3": Quantization("trellis3", attention="int6", head="int8"),
    "trellis2": Quantization("trellis2", attention="int6", head="int8"),
    "a mix": Quantization("nf4", attention="int8", head="int8"),
}
TINY = {
    "model_type": "mixtral",
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": EXPERTS // LAYERS,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}
# Relative, 0.03 for others: kernels of CPUs round inputs to 8 or 16 bits.
TOLERANCES = {"fp32": 1e-5, "fp16": 0.01}


def random_case(directory: Path, kind: str, ids: Sequence[Sequence[int]], **changes: Any) -> Case:
    """Install a random model of a kind, and let the CPU compute the logits of passes."""
    config = {**TINY, **changes}
    blueprint = Blueprint(read_config(config), KINDS[kind])
    if kind == "a mix":
        forms = [("trellis3", "nf4"), ("nf4", None), ("trellis2", "trellis3")]
        blueprint = mixed(blueprint, forms[: blueprint.config.num_moe_layers])  # type: ignore
    write_random(directory, config, blueprint)
    return installed_case(directory, ids)


def installed_case(directory: Path, ids: Sequence[Sequence[int]] | None = None) -> Case:
    with InstalledModel(directory) as model:
        blueprint = model.blueprint
    engine = load_engine(directory, LoadOptions(device="cpu", context_size=CONTEXT))
    return Case(directory, blueprint, logits(engine, ids or PASSES))


def load(
    case: Case,
    slots: int,
    host: int = 0,
    note: Note = lambda text: None,
    *,
    others: Sequence[int] = (),
    more: int = 0,
    **options: Any,
) -> Engine:
    """An engine with so many slots on the first GPU, in RAM, and on each of the other GPUs.

    more: bytes of the first GPU beyond what that takes.
    """
    demand = demand_of(case, options.get("kv_bits"))
    shared = demand.beside_experts
    return load_engine(
        case.directory,
        LoadOptions(
            host_memory=MemoryBudget(size=host * demand.expert),
            device_memory=(
                MemoryBudget(size=shared + slots * demand.expert + more),
                *(MemoryBudget(size=demand.scratch + count * demand.expert) for count in others),
            ),
            context_size=CONTEXT,
            **options,
        ),
        note,
    )


class Spread(NamedTuple):
    """Slots on the first GPU, on each other one, and in RAM; and what becomes of them."""

    first: int
    others: tuple[int, ...]
    host: int
    tiers: dict[str, int]


SPREADS = {
    "one holds all": Spread(EXPERTS, (), 0, {"device": EXPERTS, "host": 2}),
    "half in RAM": Spread(8, (), EXPERTS, {"device": 6, "host": EXPERTS}),
    "few, and the disk": Spread(5, (), 4, {"device": 3, "host": 4}),
    "two hold all": Spread(8, (8,), 0, {"device": 8, "other-device": 4, "host": 2}),
    "two over RAM for some": Spread(6, (5,), 6, {"device": 5, "other-device": 1, "host": 6}),
}


def spread_out(paper: PaperRuntime, case: Case, name: str, **options: Any) -> Engine:
    spread = SPREADS[name]
    paper.devices = 1 + len(spread.others)
    return load(case, spread.first, spread.host, others=spread.others, **options)


def demand_of(case: Case, kv_bits: Any = None) -> Demand:
    options = LoadOptions(context_size=CONTEXT, kv_bits=kv_bits)
    return fit_model(case.blueprint, FreeMemory(10**12, 10**12), options).demand


def logits(engine: Engine, passes: Sequence[Sequence[int]] | None = None) -> torch.Tensor:
    """Return the logits of a prompt's tokens, and of five decoded after them: [25, V]."""
    model, cache = engine.passes.model, engine.held()[1]
    with torch.inference_mode():
        found = [
            model.forward(torch.tensor(ids), cache, logits_of=slice(None)).float().cpu()
            for ids in passes or PASSES
        ]
    return torch.cat(found)


def tokens_agree(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Return whether the same tokens are best, but for those that are all but equally good."""
    best = found.argmax(-1, keepdim=True)
    lead = expected.amax(-1, keepdim=True) - expected.gather(-1, best)
    return bool((lead <= 0.05 * expected.std(-1, keepdim=True)).all())


def text(engine: Engine) -> list[int]:
    return list(engine.generate(PROMPT, sampling=GREEDY, stop_ids=set(), max_tokens=8))


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
