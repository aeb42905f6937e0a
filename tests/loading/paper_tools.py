"""Tiny models on GPUs on paper: what the tests of one GPU and of several have in common."""

import gc
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from paper_runtime import PaperRuntime

from mixchat.base.options import LoadOptions, SamplingOptions
from mixchat.base.progress import Note
from mixchat.base.quantities import MemoryBudget
from mixchat.engine.generate import Engine
from mixchat.experts.placement import Demand
from mixchat.loading.loader import load_engine
from mixchat.planning.fitting import FreeMemory, fit_model
from mixchat.planning.gpu_speeds import GPUSpeeds
from mixchat.planning.machine_speeds import MachineSpeeds, Measurement
from mixchat.weights.format.blueprint import Blueprint

GREEDY = SamplingOptions(temperature=0)
LAYERS, EXPERTS = 3, 12
PROMPT = list(range(5, 25))
CONTEXT = 64


def speeds(copy: float, expert: float) -> Measurement:
    """A machine that copies `copy` bytes a second, whose CPU takes `expert` s for an expert."""
    gpu = GPUSpeeds("GPU on paper", memory=1e11, bus=copy, compute=1e13)
    seconds = {"cpu": {1: expert, 8: 8 * expert}}
    sample = MachineSpeeds(1e9, 1e9, 1e9, 1e9, seconds, 1e-3, (gpu,))
    return Measurement(time.time(), (sample,))


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

KINDS: dict[str, dict[str, Any]] = {
    "fp32": {"quant_type": "none"},
    "fp16": {"quant_type": "none", "stored_as": "float16"},
    "nf4": {},
    "trellis3": {"quant_type": "trellis3"},
    "16 bits": {"attention": 16, "head": 16},
    "all in nf4": {"attention": 4, "head": 4},
}
# Relative, 0.03 for others: in 4 bits, kernels of CPUs round differently. With attention in 4 bits
# two of the 25 tokens get another expert for it, of two that are all but equally good.
TOLERANCES = {"fp32": 1e-5, "fp16": 0.01, "all in nf4": 0.05}


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
    shared = demand.shared + demand.context
    return load_engine(
        case.directory,
        LoadOptions(
            host_memory=MemoryBudget(size=host * demand.expert),
            device_memory=(
                MemoryBudget(size=shared + slots * demand.expert + more),
                *(MemoryBudget(size=count * demand.expert) for count in others),
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


def _spread(first: int, *others: int, host: int = 0) -> Spread:
    tiers = {"device": first} | ({"other-device": sum(others)} if others else {})
    return Spread(first, others, host, tiers | ({"host": host} if host else {}))


SPREADS = {
    "one holds all": _spread(EXPERTS),
    "one over RAM for all": _spread(3, host=EXPERTS),
    "one over RAM for some": _spread(3, host=5),
    "one with two over RAM for four": _spread(2, host=4),
    "one over the disk": _spread(3),
    "two hold all": _spread(6, 6),
    "two hold all, each could alone": Spread(
        EXPERTS, (EXPERTS,), EXPERTS, {"device": 6, "other-device": 6}
    ),
    "two over RAM for all": _spread(3, 2, host=EXPERTS),
    "two over RAM for some": _spread(3, 3, host=8),
    "two, one of them over RAM": _spread(3, 3, host=5),
    "two over the disk": _spread(2, 4),
    "three hold all": Spread(2, (8, 3), 0, {"device": 2, "other-device": 10}),
    "three over RAM for all": _spread(2, 2, 2, host=EXPERTS),
    "three over the disk": _spread(2, 2, 2),
}


def spread_out(paper: PaperRuntime, case: Case, name: str, **options: Any) -> Engine:
    spread = SPREADS[name]
    paper.devices = 1 + len(spread.others)
    return load(case, spread.first, spread.host, others=spread.others, **options)


def demand_of(case: Case, kv_bits: Any = None) -> Demand:
    options = LoadOptions(context_size=CONTEXT, kv_bits=kv_bits)
    return fit_model(case.blueprint, FreeMemory(10**12), options).demand


def logits(engine: Engine) -> torch.Tensor:
    """Return the logits of a prompt's tokens, and of five decoded after them: [25, V]."""
    with torch.inference_mode():
        found = [
            engine.passes.model.forward(torch.tensor(ids), engine.held()[1], logits_of=slice(None))
            for ids in (PROMPT, [33], [60], [2], [95], [8])
        ]
        return torch.cat([rows.float().cpu() for rows in found])


def text(engine: Engine) -> list[int]:
    return list(engine.generate(PROMPT, sampling=GREEDY, stop_ids=set(), max_tokens=8))


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
