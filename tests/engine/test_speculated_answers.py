"""Answers and caches have the same bits with speculation as without it."""

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import engine_tools
import pytest
import torch
from engine_tools import GREEDY, RECURRENT, WAYS, Always, cache_content

from mixchat.base import interrupts
from mixchat.base.errors import CheckpointError
from mixchat.base.options import LoadOptions, SamplingOptions
from mixchat.base.quantities import MemoryBudget
from mixchat.engine.caches.sequence_cache import SequenceCache
from mixchat.engine.generate import Engine
from mixchat.engine.model import LAST, Transformer
from mixchat.engine.speculation import Proposals
from mixchat.experts.holder import ExpertRunner
from mixchat.experts.recording_runner import RecordingRunner
from mixchat.kernels.cpu.compile import kernels_available
from mixchat.loading.loader import load_engine

# Cold enough for random models to repeat themselves now and then.
SAMPLED = SamplingOptions(temperature=0.1, seed=7)
PENALIZED = SamplingOptions(temperature=0.1, seed=7, repeat_penalty=1.1, top_p=0.9, min_p=0.05)
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], LoadOptions]] = {
    "nf4": ({}, {}, LoadOptions()),
    "trellis3": ({}, {"quant_type": "trellis3"}, LoadOptions()),
    "attention and head in bf16": ({}, {"attention": 16, "head": 16}, LoadOptions()),
    "attention in nf4": ({}, {"attention": 4}, LoadOptions()),
    "dense in bf16": ({"dtype": "bfloat16"}, {"quant_type": "none"}, LoadOptions()),
    "dense in fp32": ({}, {"quant_type": "none"}, LoadOptions()),
    "8-bit cache": ({}, {}, LoadOptions(kv_bits=8)),
    "sliding window": ({"sliding_window": 20}, {}, LoadOptions()),
    "from disk": ({}, {}, LoadOptions(host_memory=MemoryBudget(fraction=0.3))),
    "exact prompts": ({}, {}, LoadOptions(exact_prompts=True)),
    **{
        name: ({**changes, "std": 0.03, "seed": 2}, {}, LoadOptions())
        for name, changes in WAYS.items()
        # States cannot be cut back to the accepted tokens. Gemma's texts repeat nothing.
        if name not in RECURRENT and changes["model_type"] != "gemma4"
    },
    "multipliers": (WAYS["multipliers"], {}, LoadOptions()),  # else all proposals are accepted
}

pytestmark = pytest.mark.skipif(not kernels_available(), reason="the kernels need AVX2")


@pytest.fixture
def models(model_of: Callable[..., Path]) -> Callable[[str], Path]:
    """Return the installed model of a kind."""
    shape = {"std": 0.1, "intermediate_size": 128}
    return lambda kind: model_of({**shape, **KINDS[kind][0]}, KINDS[kind][1])


@pytest.fixture
def pair(models: Callable[[str], Path]) -> Callable[..., tuple[Engine, Engine]]:
    """Load a model twice: with speculation that never stops, and without."""

    def load(kind: str, **options: Any) -> tuple[Engine, Engine]:
        changed = replace(KINDS[kind][2], device="cpu", **options)
        engines = [
            load_engine(models(kind), replace(changed, speculation=how)) for how in (True, False)
        ]
        assert engines[1].speculation is None
        assert engines[0].speculation is not None
        engines[0].speculation = Always()
        return engines[0], engines[1]

    return load


def prompt_of(seed: int) -> list[int]:
    """Return tokens that repeat themselves in part."""
    choose = random.Random(seed)
    piece = [choose.randrange(3, 97) for _ in range(choose.randrange(6, 14))]
    others = [choose.randrange(3, 97) for _ in range(choose.randrange(1, 8))]
    return [*piece, *others, *piece]


# The model answers it with the same token again and again.
LOOPING = 2 * [17, 19, 72, 79, 94, 25, 31, 19]


def answer(
    engine: Engine, prompt: Sequence[int], sampling: SamplingOptions, **how: Any
) -> list[int]:
    return engine_tools.answer(engine, prompt, sampling, **{"max_tokens": 40, **how})


def same_state(one: Engine, other: Engine) -> bool:
    """Return whether caches have the same tokens, and the same bits in whole blocks."""
    ids = one.held()[0]
    whole = len(ids) // 16 * 16
    pairs = zip(cache_content(one, whole), cache_content(other, whole), strict=True)
    return ids == other.held()[0] and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_and_cache_are_those_without_it(pair, kind):
    speculating, plain = pair(kind)
    accepted = proposed = 0
    for seed, sampling in itertools.product(range(2), (GREEDY, SAMPLED, PENALIZED)):
        prompt = prompt_of(seed)
        assert answer(speculating, prompt, sampling) == answer(plain, prompt, sampling)
        assert same_state(speculating, plain)
        did = speculating.stats.speculation
        accepted, proposed = accepted + did.accepted, proposed + did.proposed
        assert plain.stats.speculation.passes == 0
    assert 0 < accepted <= proposed


def partly_right(whole: list[int], seed: int) -> Callable[..., list[int]]:
    """Return a method that proposes what comes in `whole`; most proposals have a wrong token."""
    choose = random.Random(seed)

    def propose(self: Proposals, ids: Sequence[int], most: int) -> list[int]:
        proposal = whole[len(ids) : len(ids) + min(choose.randrange(25), most)]
        if proposal and choose.random() < 0.7:
            proposal[choose.randrange(len(proposal))] = choose.randrange(3, 97)
        return proposal

    return propose


@pytest.mark.parametrize("kind", ["nf4", "8-bit cache", "sliding window", "from disk"])
def test_whatever_is_proposed_answers_are_those_without_it(pair, monkeypatch, kind):
    """Proposals of all lengths are right up to any token."""
    speculating, plain = pair(kind)
    for seed, sampling in itertools.product(range(2), (GREEDY, SamplingOptions(1.0, seed=4))):
        prompt = prompt_of(seed)
        expected = answer(plain, prompt, sampling)
        monkeypatch.setattr(Proposals, "propose", partly_right([*prompt, *expected], seed))
        assert answer(speculating, prompt, sampling) == expected
        assert same_state(speculating, plain)
        assert len(expected) < 20 or speculating.stats.speculation.accepted


def test_fewer_passes_suffice_where_text_is_repeated(pair, monkeypatch):
    passes: dict[SequenceCache, int] = {}
    forward = Transformer.forward

    def counting(
        self: Transformer, ids: torch.Tensor, cache: SequenceCache, **how: Any
    ) -> torch.Tensor:
        passes[cache] = passes.get(cache, 0) + 1
        return forward(self, ids, cache, **how)

    monkeypatch.setattr(Transformer, "forward", counting)
    engines = pair("nf4")
    for engine in engines:
        answer(engine, LOOPING, GREEDY, max_tokens=80)
    with_it, without = (passes[engine.held()[1]] for engine in engines)
    assert without == 80
    assert with_it == 80 - engines[0].stats.speculation.accepted
    assert with_it < 40


def test_it_ends_like_an_answer_without_it(pair):
    engines = pair("nf4")
    whole, same = (answer(engine, LOOPING, GREEDY, stop_ids=set()) for engine in engines)
    assert whole == same
    ways: list[dict[str, Any]] = [{"max_tokens": count} for count in (1, 2, 3, 8, 16, 17, 39)]
    ways += [{"stop_ids": {token}} for token in set(whole)]
    for how in ways:
        one, other = (answer(engine, LOOPING, GREEDY, **how) for engine in engines)
        assert one == other
        assert same_state(*engines)


@pytest.mark.parametrize("room", [1, 2, 19])
def test_it_fills_the_context_to_the_last_token(pair, room):
    engines = pair("nf4", context_size=len(LOOPING) + room)
    how = {"max_tokens": None, "stop_ids": set()}
    one, other = (answer(engine, LOOPING, GREEDY, **how) for engine in engines)
    assert one == other
    assert len(one) == room
    assert same_state(*engines)


@pytest.mark.parametrize("taken", [1, 16, 37])
def test_an_answer_that_is_dropped_leaves_the_cache_as_without_it(pair, taken):
    """A stop string ends an answer so. Tokens that were verified after it belong to no text."""
    engines = pair("nf4")
    for engine in engines:
        ids = engine.generate(LOOPING, sampling=GREEDY, stop_ids=set())
        part = [next(ids) for _ in range(taken)]
        ids.close()  # type: ignore[attr-defined]
        assert engine.held()[0] == [*LOOPING, *part[:-1]]
    assert same_state(*engines)
    longer = [*LOOPING, *part, 7]
    assert answer(engines[0], longer, SAMPLED) == answer(engines[1], longer, SAMPLED)


def test_a_pass_that_ctrl_c_ends_leaves_the_next_turn_right(pair, monkeypatch):
    engines, verifying = pair("nf4"), []
    forward = Transformer.forward

    def interrupted(
        self: Transformer, ids: torch.Tensor, cache: SequenceCache, **how: Any
    ) -> torch.Tensor:
        if how["logits_of"] != LAST:
            verifying.append(True)
            how["after_layer"] = lambda layer: interrupts.check() if layer else stop()
        return forward(self, ids, cache, **how)

    def stop() -> None:
        raise KeyboardInterrupt

    part: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(Transformer, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            part.extend(engines[0].generate(LOOPING, sampling=GREEDY, stop_ids=set()))
    assert verifying == [True]
    answer(engines[1], LOOPING, GREEDY, max_tokens=5)
    assert answer(engines[0], LOOPING, GREEDY) == answer(engines[1], LOOPING, GREEDY)
    assert same_state(*engines)


@pytest.mark.parametrize(
    ("changes", "how"),
    [
        ({"intermediate_size": 12}, {"quant_type": "none"}),
        ({"stored_as": "float16"}, {"quant_type": "none"}),
    ],
    ids=["odd shape", "fp16"],
)
def test_there_is_none_where_passes_are_not_exact(make_checkpoint, install, changes, how):
    model = install(make_checkpoint(**{"intermediate_size": 128, **changes}), **how)
    assert load_engine(model, LoadOptions(device="cpu")).speculation is None


def test_there_is_none_where_what_experts_get_is_recorded(models):
    """Tokens that are rejected are none of the text."""

    def wrap(runner: ExpertRunner) -> ExpertRunner:
        return RecordingRunner(runner, lambda *given: None)

    assert load_engine(models("nf4"), LoadOptions(device="cpu")).speculation is not None
    assert load_engine(models("nf4"), LoadOptions(device="cpu"), wrap=wrap).speculation is None


def test_damaged_weights_are_named_although_tokens_were_verified(pair, monkeypatch):
    speculating, _ = pair("nf4")
    forward = Transformer.forward

    def damaged(
        self: Transformer, ids: torch.Tensor, cache: SequenceCache, **how: Any
    ) -> torch.Tensor:
        logits = forward(self, ids, cache, **how)
        return logits * float("nan") if how["logits_of"] != LAST else logits

    monkeypatch.setattr(Transformer, "forward", damaged)
    with pytest.raises(CheckpointError, match="not numbers"):
        answer(speculating, LOOPING, GREEDY)
