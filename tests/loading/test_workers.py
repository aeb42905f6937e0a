"""Answers with workers: the bits of one machine, whoever computes and whoever fails."""

import os
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from served_workers import KEY, Fault, Nursery, ThreadedWorker, open_served

from mixchat.engine.generate import Engine
from mixchat.errors import ResourceError
from mixchat.experts.workers.link import Link
from mixchat.loading import workers
from mixchat.loading.loader import load_engine
from mixchat.options import LoadOptions, SamplingOptions
from mixchat.progress import Note
from mixchat.quantities import MemoryBudget
from mixchat.weights.format.installed_model import InstalledModel

LAYERS, EXPERTS = 3, 12
PROMPT = list(range(5, 25))
CONTEXT = 128

# hidden_size 50 and 80 are no multiples of 32; 70 and 112 no multiples of 64.
KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"layout": "bitsandbytes"},
    "nf4, packed": {"layout": "cpu-packed"},
    "nf4, odd shapes": {"hidden_size": 80, "intermediate_size": 112},
    "fp32": {"quant_type": "none"},
    "fp32, odd shapes": {"quant_type": "none", "hidden_size": 50, "intermediate_size": 70},
    "bf16": {"quant_type": "none", "stored_as": "bfloat16"},
    "bf16, odd shapes": {
        "quant_type": "none",
        "stored_as": "bfloat16",
        "hidden_size": 50,
        "intermediate_size": 70,
    },
}
CHECKPOINT = ("stored_as", "hidden_size", "intermediate_size")

# Slots of this machine, and of each worker.
SPLITS = {
    "one, half each": (6, [6]),
    "one, most of it there": (2, [10]),
    "one, most of it here": (10, [2]),
    "one, all twice": (12, [12]),
    "one, too few": (2, [3]),
    "two": (4, [4, 4]),
    "two, unequal": (3, [7, 2]),
    "two, some twice": (6, [6, 5]),
    "three": (3, [3, 3, 3]),
    "three, all of it there": (2, [12, 12, 12]),
    "three, too few": (2, [2, 2, 2]),
}


@pytest.fixture(scope="module")
def model(
    make_checkpoint: Callable[..., Path], install: Callable[..., Path]
) -> Callable[[str], Path]:
    """Return the model of a kind, installed when it is first asked for."""
    made: dict[str, Path] = {}

    def model(kind: str) -> Path:
        if kind not in made:
            shape = {name: value for name, value in KINDS[kind].items() if name in CHECKPOINT}
            options = {name: value for name, value in KINDS[kind].items() if name not in CHECKPOINT}
            made[kind] = install(make_checkpoint(num_hidden_layers=LAYERS, **shape), **options)
        return made[kind]

    return model


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "worker.key"
    path.write_text(KEY.hex())
    path.chmod(0o600)
    return path


@pytest.fixture
def load(model: Callable[[str], Path], key_file: Path) -> Callable[..., Engine]:
    """Load an engine with so many slots, or all, and workers at these addresses."""

    def load(
        kind: str,
        slots: int = EXPERTS,
        addresses: Sequence[str] = (),
        note: Note = lambda line: None,
        exact: bool = False,
    ) -> Engine:
        with InstalledModel(model(kind)) as installed:
            budget = MemoryBudget(size=slots * installed.blueprint.expert.stride)
        options = LoadOptions(
            budget,
            context_size=CONTEXT,
            device="cpu",
            exact_prompts=exact,
            workers=tuple(addresses),
            key_file=key_file,
        )
        return load_engine(model(kind), options, note)

    return load


@pytest.fixture
def start(model: Callable[[str], Path]) -> Iterator[Callable[[str, int], ThreadedWorker]]:
    """Start a worker with so many slots in a thread."""
    started: list[ThreadedWorker] = []

    def start(kind: str, slots: int) -> ThreadedWorker:
        started.append(ThreadedWorker(open_served(model(kind), slots)))
        return started[-1]

    yield start
    for worker in started:
        worker.stop()


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    opened = Nursery()
    yield opened
    opened.end()


@pytest.fixture
def fork(nursery: Nursery) -> Iterator[Nursery]:
    """Start workers in processes, which end with the test."""
    yield nursery
    nursery.end_workers()


def logits(engine: Engine) -> torch.Tensor:
    """Return the logits of a prompt's tokens, and of five decoded after them: [25, V]."""
    with torch.inference_mode():
        found = [
            engine._model.forward(torch.tensor(ids), engine._cache, all_logits=True)
            for ids in (PROMPT, [33], [60], [2], [95], [8])
        ]
        engine.forget()
        return torch.cat(found)


def text(engine: Engine, prompt: Sequence[int] = PROMPT, tokens: int = 12) -> list[int]:
    greedy = SamplingOptions(temperature=0)
    return list(engine.generate(prompt, sampling=greedy, stop_ids=set(), max_tokens=tokens))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", KINDS)
def test_who_computes_does_not_show_in_the_bits(
    load: Callable[..., Engine], start: Callable[..., ThreadedWorker], kind: str, split: str
) -> None:
    """In fp32 with odd shapes it did: MKL's result for rows that are not aligned differs."""
    here, there = SPLITS[split]
    started = [start(kind, slots) for slots in there]
    alone, engine = load(kind), load(kind, here, [worker.address for worker in started])
    for exact in (False, True):
        if exact:
            del engine
            alone = load(kind, exact=True)
            engine = load(kind, here, [worker.address for worker in started], exact=True)
        assert torch.equal(logits(engine), logits(alone))
        assert text(engine) == text(alone)
        assert engine.slots_by_tier["worker"] == sum(there)
    del engine
    assert min(worker.requests() for worker in started) > 0
