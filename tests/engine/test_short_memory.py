"""Passes for which a GPU's memory is too small: fewer tokens come first, then fewer experts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_tools import GREEDY

from mixchat.base.errors import ResourceError
from mixchat.base.options import LoadOptions
from mixchat.engine.answer import TokenAnswer
from mixchat.engine.batch import Batch
from mixchat.engine.chunk_sizer import PREFILL_CHUNK, PassSizer
from mixchat.engine.generate import Engine
from mixchat.loading.loader import load_engine

PROMPT = [3 + n % 90 for n in range(100)]


class SmallMemory:
    """Lets passes of more than `tokens` tokens fail, and counts passes and what gave way.

    Each of the `spare` times that experts give way, there is room for 8 tokens more.
    """

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens, self.spare = 10**6, 0
        self.passes: list[int] = []
        self.failed: list[int] = []
        self.given = 0
        self._forward = engine.passes.model.forward
        monkeypatch.setattr(engine.passes.model, "forward", self.forward)
        monkeypatch.setattr(engine.experts, "give_way", self.give_way)

    def forward(self, ids: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        if len(ids) > self.tokens:
            self.failed.append(len(ids))
            raise torch.OutOfMemoryError("out of memory. GPU 0 has a total capacity of 4 GiB")
        self.passes.append(len(ids))
        return self._forward(ids, *arguments, **options)

    def give_way(self, number: int | None = None) -> bool:
        if not self.spare:
            return False
        self.given, self.spare = self.given + 1, self.spare - 1
        self.tokens += 8
        return True


@pytest.fixture
def engine(tiny_model: Path) -> Engine:
    options = LoadOptions(device="cpu", parallel=2, exact_prompts=True, speculation=False)
    return load_engine(tiny_model, options)


@pytest.fixture
def memory(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> SmallMemory:
    return SmallMemory(engine, monkeypatch)


Answer = Callable[..., list[int]]


def request(ids: list[int] = PROMPT, tokens: int = 6) -> TokenAnswer:
    return TokenAnswer(ids, GREEDY, frozenset(), tokens)


def answers(batch: Batch, *prompts: list[int]) -> list[list[int]]:
    """Return the answers to prompts, of which each begins once the one before decodes."""
    running = []
    for ids in prompts:
        while running and running[-1].generated_tokens < 2:
            batch.step()
        running.append(batch.add(request(ids)))
    while batch.size:
        batch.step()
    assert [answer.error for answer in running] == [None] * len(running)
    return [answer.ids[answer.stats.prompt_tokens :] for answer in running]


def test_a_prompt_takes_fewer_tokens_a_pass_before_any_expert_gives_way(engine, memory):
    (expected,) = answers(engine.new_batch(), PROMPT)
    engine.forget()
    memory.passes.clear()
    memory.tokens, memory.spare = 30, 5
    assert answers(engine.new_batch(), PROMPT) == [expected]
    assert memory.failed == [100, 50]
    assert memory.passes == [25, 25, 25, 25, *[1] * 5]
    assert memory.given == 0


def test_experts_give_way_only_to_the_fewest_tokens(engine, memory):
    (expected,) = answers(engine.new_batch(), PROMPT)
    engine.forget()
    memory.passes.clear()
    memory.tokens, memory.spare = 5, 5
    assert answers(engine.new_batch(), PROMPT) == [expected]
    assert memory.failed == [100, 50, 25, 16, 16]
    assert memory.given == 2
    assert memory.passes == [*[16] * 6, 4, *[1] * 5]


def test_without_experts_that_can_give_way_the_answer_fails_and_the_next_one_does_not(
    engine, memory
):
    (expected,) = answers(engine.new_batch(), PROMPT)
    engine.forget()
    memory.tokens = 5
    batch = engine.new_batch()
    answer = batch.add(request())
    while batch.size:
        batch.step()
    assert isinstance(answer.error, ResourceError)
    assert answer.generated_tokens == 0
    memory.tokens = 10**6
    assert answers(batch, PROMPT) == [expected]


def test_an_answer_that_decodes_beside_gets_no_token_twice(engine, memory):
    """Its last logits were sampled again after a pass that had computed nothing."""
    other = [3 + 7 * n % 90 for n in range(60)]
    expected = [answers(engine.new_batch(shared_prefix=False), ids)[0] for ids in (PROMPT, other)]
    engine.forget()
    batch = engine.new_batch(shared_prefix=False)
    first = batch.add(request())
    while first.generated_tokens < 2:
        batch.step()
    memory.tokens = 20
    second = batch.add(request(other))
    while batch.size:
        generated = first.generated_tokens
        failed = len(memory.failed)
        changed = batch.step()
        if len(memory.failed) > failed:
            assert first.generated_tokens == generated
            assert changed == []
    assert memory.failed
    found = [answer.ids[answer.stats.prompt_tokens :] for answer in (first, second)]
    assert found == expected


@pytest.mark.parametrize("after", range(1, 12, 3))
def test_an_allocation_may_fail_in_any_layer(engine, memory, monkeypatch, after):
    (expected,) = answers(engine.new_batch(), PROMPT)
    engine.forget()
    compute, left = type(engine.experts).compute, after

    def failing(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            raise torch.OutOfMemoryError("out of memory")
        return compute(self, *arguments, **options)

    monkeypatch.setattr(type(engine.experts), "compute", failing)
    memory.spare = 1
    assert answers(engine.new_batch(), PROMPT) == [expected]
    assert left <= 0 or memory.passes[-1] == 1


def test_passes_grow_again_with_the_next_prompts():
    sizer = PassSizer()
    sizer.shrink(2048)
    assert sizer.choose(decodes=False) == 1024
    sizer.shrink(1024)
    sizer.shrink(512)
    assert sizer.choose(decodes=False) == 256
    for expected in (512, 1024, 2048, 2048):
        sizer.recover()
        assert sizer.choose(decodes=False) == expected == min(expected, PREFILL_CHUNK)
    sizer.shrink(20)
    assert sizer.choose(decodes=False) == 16
    assert sizer.choose(decodes=True) == 16


def test_a_fixed_size_gives_way_to_memory_too():
    sizer = PassSizer(300)
    assert sizer.choose(decodes=False) == 300
    sizer.shrink(300)
    assert sizer.choose(decodes=True) == 150
    one = PassSizer(1)
    one.shrink(16)
    assert one.choose(decodes=False) == 1
