"""Decoding by programs of kernels: the bits are those of the blocks in `model.py`."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_tools import FAMILIES, answer, cache_content

from mixchat.base.options import LoadOptions, SamplingOptions
from mixchat.base.quantities import MemoryBudget
from mixchat.engine.decoder import Decoder
from mixchat.engine.generate import Engine
from mixchat.engine.passes import SequenceTokens
from mixchat.experts.recording_runner import RecordingRunner
from mixchat.kernels.cpu.compile import kernels_available
from mixchat.kernels.cpu.program import Program
from mixchat.loading.loader import load_engine
from mixchat.weights.format.installed_model import InstalledModel

pytestmark = pytest.mark.skipif(not kernels_available(), reason="the kernels need AVX2")

SHAPE = {"intermediate_size": 128, "head_dim": 32, "num_local_experts": 5, "vocab_size": 128}
# Forms of an installed model and of its cache: each takes other ways through the kernels.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], int | None]] = {
    "nf4": ({}, {}, None),
    "attention in nf4": ({}, {"attention": 4}, None),
    "experts in trellis3": ({}, {"quant_type": "trellis3"}, None),
    "head with rows of zeros": ({"vocab_size": 97}, {}, None),
    "dense head": ({}, {"head": 16}, None),
    "8-bit cache": ({}, {}, 8),
    "sliding window": ({"sliding_window": 20}, {}, None),
    "one kv head": ({"num_key_value_heads": 1}, {}, None),
    "top 3": ({"num_experts_per_tok": 3}, {}, None),
    "top 1": ({"num_experts_per_tok": 1}, {}, None),
    "top 10 of 160": ({"num_local_experts": 160, "num_experts_per_tok": 10}, {}, None),
    **{name: (changes, {}, None) for name, changes in FAMILIES.items()},
    "latents in 8 bits": (FAMILIES["latents"], {}, 8),
    "latents, attention in nf4": (FAMILIES["latents"], {"attention": 4}, None),
}
PROMPT, TOKENS = list(range(3, 33)), 16
FREE = SamplingOptions(temperature=1.0, seed=5)


@pytest.fixture
def models(model_of: Callable[..., Path]) -> Callable[[str], Path]:
    """Return the installed model of a kind."""
    return lambda kind: model_of({**SHAPE, **KINDS[kind][0]}, KINDS[kind][1])


def load(directory: Path, slots: int | None = None, **options: Any) -> Engine:
    if slots is not None:
        with InstalledModel(directory) as installed:
            stride = installed.blueprint.expert.stride
        options["host_memory"] = MemoryBudget(size=slots * stride)
    return load_engine(directory, LoadOptions(device="cpu", **options))


def without_programs(engine: Engine) -> Engine:
    engine.passes.model.set_decoder(None)
    return engine


def written(engine: Engine, tokens: int = TOKENS) -> tuple[list[int], list[torch.Tensor]]:
    """Return the answer, and every byte of the KV cache."""
    engine.forget()
    return answer(engine, PROMPT, FREE, max_tokens=tokens), cache_content(engine)


def same(one: tuple[list[int], list[torch.Tensor]], other: Any) -> bool:
    return one[0] == other[0] and all(map(torch.equal, one[1], other[1]))


@pytest.mark.parametrize(
    ("kind", "slots"),
    [*((kind, None) for kind in KINDS), ("nf4", 3), ("sinks, biases and experts in mxfp4", 3)],
)
def test_answers_and_caches_have_the_bits_of_the_blocks(kind, slots, models):
    options = {"kv_bits": KINDS[kind][2]}
    expected = written(without_programs(load(models(kind), **options)))
    engine = load(models(kind), slots, **options)
    assert isinstance(engine.passes.model._decoder, Decoder)
    assert same(written(engine), expected)
    assert same(written(engine), expected)  # now with everything in memory, if it fits


def logits_of_several(engine: Engine) -> list[torch.Tensor]:
    """Return the logits of passes over three sequences, then over two, with other tokens each."""
    passes = engine.passes
    for number, prefix in enumerate(engine.sequences):
        passes.compute([SequenceTokens(prefix, PROMPT[: 9 * number + 5])], exact=True)
    turns = [engine.sequences] * 3 + [engine.sequences[1:]] * 2 + [engine.sequences]
    return [
        passes.compute(
            [SequenceTokens(prefix, [7 * turn + row]) for row, prefix in enumerate(prefixes)],
            exact=True,
        )
        for turn, prefixes in enumerate(turns)
    ]


@pytest.mark.parametrize(
    ("kind", "slots"),
    [*((kind, None) for kind in KINDS), ("nf4", 3), ("experts in trellis3", 3)],
)
def test_several_sequences_at_once_have_the_bits_of_the_blocks(kind, slots, models):
    options = {"kv_bits": KINDS[kind][2], "parallel": 3}
    expected = logits_of_several(without_programs(load(models(kind), **options)))
    engine = load(models(kind), slots, **options)
    assert all(map(torch.equal, logits_of_several(engine), expected))
    decoders = engine.passes.model._decoder._decoders  # type: ignore[union-attr]
    assert set(decoders) == {1, 2, 3}


def test_programs_are_kept_for_the_last_counts_of_sequences(models):
    engine = load(models("nf4"), parallel=6)
    for count in (6, 5, 4, 3, 2, 5):
        chunks = [SequenceTokens(prefix, [3]) for prefix in engine.sequences[:count]]
        engine.passes.compute(chunks, exact=True)
    assert [*engine.passes.model._decoder._decoders] == [1, 3, 2, 5]  # type: ignore[union-attr]


@pytest.mark.parametrize("slots", [None, 3])
def test_the_logits_of_a_token_stay_as_they_are_when_the_next_one_is_computed(slots, models):
    engine = load(models("nf4"), slots)
    assert engine.passes.model._decoder._decoders[1]._head.stages  # type: ignore[union-attr]
    prefix = engine.sequences[0]
    passes = [engine.passes.compute([SequenceTokens(prefix, [token])]) for token in PROMPT[:5]]
    copies = [logits.clone() for logits in passes]
    engine.passes.compute([SequenceTokens(prefix, PROMPT[:1])])
    assert all(map(torch.equal, passes, copies))
    assert len({tuple(logits[0].tolist()) for logits in passes}) == 5


def test_with_all_experts_in_memory_their_runner_is_not_asked(models, monkeypatch):
    engine = load(models("nf4"))
    expected = written(engine)
    before = engine.experts.stats
    monkeypatch.setattr(type(engine.experts), "run", None)
    engine.forget()
    engine.passes.compute([SequenceTokens(engine.sequences[0], PROMPT[:1])])
    since = engine.experts.stats.since(before)
    layers, choices = engine.config.num_hidden_layers, engine.config.num_experts_per_tok
    assert since.hits.total() == layers * choices
    assert not since.misses
    monkeypatch.undo()
    assert same(written(engine), expected)


def test_with_all_experts_in_memory_several_sequences_are_one_program(models, monkeypatch):
    engine = load(models("nf4"), parallel=3)
    expected = logits_of_several(engine)
    engine.forget()
    for prefix in engine.sequences:
        prefix.clear()
    programs: list[Program] = []
    run = Program.run
    monkeypatch.setattr(Program, "run", lambda program: [programs.append(program), run(program)])
    for number, prefix in enumerate(engine.sequences):
        engine.passes.compute([SequenceTokens(prefix, PROMPT[: 9 * number + 5])], exact=True)
    programs.clear()
    before = engine.experts.stats
    chunks = [SequenceTokens(prefix, [row]) for row, prefix in enumerate(engine.sequences)]
    assert torch.equal(engine.passes.compute(chunks, exact=True), expected[0])
    assert len(programs) == 1
    # An expert that several rows have chosen is a hit once.
    hits = engine.experts.stats.since(before).hits
    assert {*hits.values()} == {1}


@pytest.mark.parametrize("early", [False, True])
def test_experts_may_be_evicted_while_a_program_runs(models, monkeypatch, early):
    """Other programs may take memory meanwhile; its hits are counted afterwards."""
    engine = load(models("nf4"))
    expected = written(engine)
    ram = engine.experts.ram  # type: ignore[attr-defined]
    run, total = Program.run, ram.slots

    def run_and_evict(program: Program) -> None:
        if early:
            ram.resize(2)
            # What would come into memory that was given back.
            others = [torch.full((1 << 14,), 255, dtype=torch.uint8) for _ in range(100)]
        run(program)
        ram.resize(2)
        if early:
            assert others

    ids: list[int] = []
    engine.forget()
    for token in engine.generate(PROMPT, sampling=FREE, stop_ids=set(), max_tokens=TOKENS):
        ids.append(token)
        monkeypatch.setattr(Program, "run", run_and_evict if len(ids) % 5 == 0 else run)
        ram.resize(total)
    assert ids == expected[0]


def test_a_program_does_not_keep_the_memory_of_a_slot(models):
    engine = load(models("nf4"))
    written(engine)
    ram = engine.experts.ram  # type: ignore[attr-defined]
    experts = [weakref.ref(ram._memory.expert(slot)) for slot in ram._memory.blocks]
    ram.resize(2)
    assert sum(expert() is not None for expert in experts) == 2


def test_a_recording_has_every_row_that_the_blocks_compute(models):
    def recorded(blocks: bool) -> list[torch.Tensor]:
        rows: list[torch.Tensor] = []
        engine = load_engine(
            models("nf4"),
            LoadOptions(device="cpu"),
            wrap=lambda runner: RecordingRunner(runner, lambda layer, x, _: rows.append(x)),
        )
        written(without_programs(engine) if blocks else engine)
        written(engine)  # with all experts in memory
        return rows

    found, expected = recorded(False), recorded(True)
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))
