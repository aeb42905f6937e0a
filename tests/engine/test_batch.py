"""Several answers at once are those that each prompt gets alone, bit for bit."""

import random
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_tools import WAYS, answer

from mixchat.base.errors import CheckpointError
from mixchat.base.options import LoadOptions, SamplingOptions
from mixchat.base.quantities import MemoryBudget
from mixchat.engine.answer import TokenAnswer
from mixchat.engine.batch import Batch
from mixchat.engine.generate import Engine
from mixchat.engine.passes import ForwardPasses
from mixchat.kernels.cpu.compile import kernels_available
from mixchat.loading.loader import load_engine
from mixchat.weights.format.installed_model import InstalledModel

pytestmark = pytest.mark.skipif(not kernels_available(), reason="the kernels need AVX2")

# Forms of a checkpoint and of an installed model, of its KV cache, and how many of its experts are
# held at once.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], LoadOptions, int | None]] = {
    "nf4": ({}, {}, LoadOptions(), None),
    "trellis3, from disk": ({}, {"quant_type": "trellis3"}, LoadOptions(), 3),
    "attention in nf4": ({}, {"attention": 4}, LoadOptions(), None),
    "8-bit cache, from disk": ({}, {}, LoadOptions(kv_bits=8), 2),
    **{name: (changes, {}, LoadOptions(), 3) for name, changes in WAYS.items()},
}


@pytest.fixture
def load(model_of: Callable[..., Path]) -> Callable[..., Engine]:
    """Load a kind of model for several conversations."""

    def load(kind: str = "nf4", **options: Any) -> Engine:
        changes, how, given, slots = KINDS[kind]
        directory = model_of({"std": 0.1, "intermediate_size": 128, **changes}, how)
        if slots is not None:
            with InstalledModel(directory) as installed:
                stride = installed.blueprint.expert.stride
            options["host_memory"] = MemoryBudget(size=slots * stride)
        options = {"device": "cpu", "exact_prompts": True, "parallel": 4, **options}
        return load_engine(directory, replace(given, **options))

    return load


def prompt_of(seed: int, **options: Any) -> TokenAnswer:
    """A prompt that repeats itself in part, so that tokens are proposed; sampled or greedy."""
    choose = random.Random(seed)
    piece = [choose.randrange(3, 97) for _ in range(choose.randrange(2, 20))]
    ids = [*piece, *(choose.randrange(3, 97) for _ in range(choose.randrange(1, 9))), *piece]
    sampling = SamplingOptions(temperature=seed % 2, seed=seed, repeat_penalty=1 + seed % 3 / 10)
    return TokenAnswer(
        ids, sampling, **{"stop_ids": frozenset({2, 7}), "max_tokens": 30, **options}
    )


def greedy(ids: Sequence[int], max_tokens: int) -> TokenAnswer:
    return TokenAnswer(ids, SamplingOptions(0), frozenset(), max_tokens)


def alone(engine: Engine, prompt: TokenAnswer) -> list[int]:
    engine.forget()
    options = {"stop_ids": prompt.stop_ids, "max_tokens": prompt.max_tokens}
    return answer(engine, prompt.ids[: prompt.stats.prompt_tokens], prompt.sampling, **options)


def finish(batch: Batch) -> None:
    while batch.size:
        batch.step()


def said(answer: TokenAnswer) -> list[int]:
    """Return the generated tokens."""
    return answer.ids[answer.stats.prompt_tokens :]


def run(batch: Batch, waiting: Sequence[TokenAnswer], seed: int = 0) -> list[list[int]]:
    """Answer all, each joining after a random count of passes."""
    choose, left = random.Random(seed), list(waiting)
    answers: list[TokenAnswer] = []
    while left or batch.size:
        while left and batch.size < batch.capacity and choose.random() < 0.4:
            answers.append(batch.add(left.pop(0)))
        batch.step()
    assert [answer.error for answer in answers] == [None] * len(answers)
    return [said(answer) for answer in answers]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read prompts a few tokens at a time."""
    monkeypatch.setattr("mixchat.engine.chunk_sizer.PREFILL_CHUNK", 5)
    monkeypatch.setattr("mixchat.engine.chunk_sizer.SMALLEST_CHUNK", 3)
    monkeypatch.setattr("mixchat.engine.chunk_sizer._FIRST_CHUNK", 4)


@pytest.mark.parametrize(("kind", "seed"), [*((kind, 0) for kind in KINDS), ("nf4", 1)])
def test_an_answer_is_the_one_that_its_prompt_gets_alone(load, kind, seed, small_pieces):
    prompts = [prompt_of(20 * seed + n) for n in range(6)]
    one = load(kind, speculation=False)
    expected = [alone(one, prompt) for prompt in prompts]
    assert run(load(kind).new_batch(), prompts, seed) == expected
    assert len({tuple(answer) for answer in expected}) == len(prompts)


def test_a_long_prompt_is_read_between_the_tokens_of_others(load, small_pieces):
    batch = load().new_batch()
    first = batch.add(prompt_of(1, stop_ids=frozenset()))
    while not first.generated_tokens:
        batch.step()
    second = batch.add(greedy(range(3, 63), 5))
    left = []
    while second.tokens_read < second.tokens_to_read:
        before = first.generated_tokens
        batch.step()
        assert first.generated_tokens == before + 1
        left.append(second.tokens_to_read - second.tokens_read)
    assert len(left) >= 12
    assert left == sorted(left, reverse=True)


def test_the_longest_beginning_is_reused_also_from_a_conversation_that_goes_on(load):
    engine = load()
    batch = engine.new_batch()
    beginning = list(range(3, 43))
    first = batch.add(greedy([*beginning, 50], 40))
    while not first.generated_tokens:
        batch.step()
    prompt = greedy([*beginning, 60, 61], 6)
    second = batch.add(prompt)
    while not second.has_ended:
        batch.step()
    assert (first.stats.reused_tokens, second.stats.reused_tokens) == (0, len(beginning))
    assert said(second) == alone(load(), prompt)
    assert first.generated_tokens < 40


def test_prompts_with_one_beginning_that_come_together_compute_it_once(load):
    engine = load()
    batch = engine.new_batch()
    beginning = list(range(3, 43))
    prompts = [greedy([*beginning, 50 + n], 4) for n in range(4)]
    answers = [batch.add(prompt) for prompt in prompts]
    finish(batch)
    assert [answer.stats.reused_tokens for answer in answers] == [0, 40, 40, 40]
    assert engine.passes.total_tokens == 41 + 3 + 4 * 3
    expected = [alone(load(), prompt) for prompt in prompts]
    assert [said(answer) for answer in answers] == expected


def test_a_conversation_that_continues_keeps_its_cache_while_others_come_and_leave(load):
    """Else each turn of a chat would be read from its beginning."""
    batch = load().new_batch()
    chat = list(range(3, 33))
    for turn in range(4):
        answer = batch.add(greedy(chat, 4))
        other = batch.add(prompt_of(90 + turn))
        finish(batch)
        assert answer.stats.reused_tokens == (0 if not turn else len(chat) - 3)
        assert other.stats.reused_tokens < 3
        chat = [*answer.ids, 40, 41]


def test_without_a_shared_prefix_no_answer_tells_what_another_prompt_began_with(load):
    """`cached_tokens` told one client of a server what another one had asked."""
    batch = load().new_batch(shared_prefix=False)
    answers = [batch.add(greedy([*range(3, 43), n], 4)) for n in (0, 1, 2, 0)]
    finish(batch)
    late = batch.add(greedy([*range(3, 43), 0], 4))
    finish(batch)
    assert [answer.stats.reused_tokens for answer in (*answers, late)] == [0] * 5
    assert late.ids == answers[0].ids == answers[3].ids


def test_prompts_that_share_nothing_take_the_cache_that_was_not_used_for_longest(load):
    engine = load()
    batch = engine.new_batch()
    used = []
    for n in range(9):
        answer = batch.add(greedy([3, 10 + n, 20 + n], 2))
        batch.step()
        used.append(engine.sequences.index(answer.prefix))  # type: ignore[arg-type]
        finish(batch)
    assert used == [0, 1, 2, 3, 0, 1, 2, 3, 0]


def test_a_cancelled_answer_leaves_and_its_cache_serves_the_next_one(load):
    batch = load().new_batch()
    answers = [batch.add(prompt_of(n, stop_ids=frozenset())) for n in range(4)]
    assert batch.size == batch.capacity
    for _ in range(6):
        batch.step()
    answers[1].cancel()
    batch.step()
    assert batch.size < batch.capacity
    prompt = prompt_of(9)
    late = batch.add(prompt)
    finish(batch)
    assert said(late) == alone(load(), prompt)
    assert answers[1].generated_tokens < 10
    assert answers[1].tokens_read == answers[1].tokens_to_read  # also after its cache was reused
    assert answers[0].generated_tokens == 30


def test_a_pass_that_nobody_waits_for_ends_after_its_layer(load, monkeypatch):
    """With Mixtral from disk, a pass with a piece of a prompt takes ten seconds or more."""
    engine = load()
    batch = engine.new_batch()
    answer = batch.add(prompt_of(1))
    layers: list[int] = []
    compute = ForwardPasses.compute

    def watched(self: ForwardPasses, parts: Any, *, after_layer: Any, **how: Any) -> torch.Tensor:
        def cancel(layer: int) -> None:
            layers.append(layer)
            answer.cancel()
            after_layer(layer)

        return compute(self, parts, after_layer=cancel, **how)

    monkeypatch.setattr(ForwardPasses, "compute", watched)
    assert batch.step() == [answer]
    assert (layers, answer.generated_tokens, batch.size) == ([0], 0, 0)
    assert engine.held()[0] == []


def test_a_fault_of_the_weights_ends_only_the_answers_that_it_hits(load, monkeypatch):
    batch = load().new_batch()
    answers = [batch.add(prompt_of(n)) for n in (5, 2)]
    batch.step()
    compute = ForwardPasses.compute

    def damaged(self: ForwardPasses, *given: Any, **how: Any) -> torch.Tensor:
        logits = compute(self, *given, **how).clone()
        logits[0] = torch.nan
        return logits

    monkeypatch.setattr(ForwardPasses, "compute", damaged)
    batch.step()
    monkeypatch.undo()
    assert isinstance(answers[0].error, CheckpointError)
    finish(batch)
    assert answers[1].error is None
    assert said(answers[1]) == alone(load(), prompt_of(2))


def test_a_fault_of_a_constraint_ends_its_answer_alone(load):
    """Its process could not be started, and all answers of the pass ended."""

    class Broken:
        compiled: Future[None] = Future()

        def allowed(self) -> torch.Tensor | None:
            raise BlockingIOError("no process")

        def accept(self, token: int) -> bool: ...

    batch = load().new_batch()
    broken = batch.add(prompt_of(1, constraint=Broken()))
    other = batch.add(prompt_of(2))
    finish(batch)
    assert isinstance(broken.error, BlockingIOError)
    assert other.error is None
    assert said(other) == alone(load(), prompt_of(2))


def test_a_file_that_cannot_be_read_ends_the_pass_and_not_the_batch(load, monkeypatch):
    batch = load().new_batch()
    answers = [batch.add(prompt_of(n)) for n in (1, 2)]

    def fails(*given: Any, **how: Any) -> torch.Tensor:
        raise CheckpointError("experts-000.safetensors cannot be read")

    monkeypatch.setattr(ForwardPasses, "compute", fails)
    batch.step()
    monkeypatch.undo()
    assert [str(answer.error) for answer in answers] == 2 * [
        "experts-000.safetensors cannot be read"
    ]
    assert batch.size == 0
    late = batch.add(prompt_of(3))
    finish(batch)
    assert said(late) == alone(load(), prompt_of(3))
