"""Layers with a window give old tokens back, and nothing shows it but the memory."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_tools import attend, in_pages, in_tensors, store
from engine_tools import FAMILIES, answer, ids_of
from test_kv_cache import CONFIG, SINKS, held, needs_kernel

from mixchat.base.options import LoadOptions, SamplingOptions
from mixchat.engine.answer import TokenAnswer
from mixchat.engine.caches import kv_cache, sequence_cache
from mixchat.engine.caches.sequence_cache import SequenceCache, cache_bytes
from mixchat.engine.generate import Engine
from mixchat.engine.prompt_cache import PromptCache
from mixchat.loading.loader import load_engine

CAPACITY = 9000
WIDE = replace(CONFIG, head_dim=32)  # pages have no padding


def paged(bits: int) -> SequenceCache:
    return in_pages(WIDE, CAPACITY, bits)


def of_tensors(bits: int) -> SequenceCache:
    return in_tensors(WIDE, CAPACITY, torch.bfloat16, bits)


LONG_KINDS = [pytest.param(paged, marks=needs_kernel), of_tensors]
KERNEL = [pytest.param(True, marks=needs_kernel, id="pages"), pytest.param(False, id="tensors")]


def turn(cache: SequenceCache, tokens: int, seed: int) -> list[torch.Tensor]:
    """Return the attention of so many new tokens in each layer."""
    generator = torch.Generator().manual_seed(seed)
    new = torch.randn(2, tokens, 8, 32, generator=generator).to(torch.bfloat16)
    seen = attend(cache, new, SINKS)
    cache.advance(tokens)
    return seen


def equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, some, others))


@pytest.fixture
def keep_all(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Let caches keep all tokens, or as many as usual."""
    usual = kv_cache.MAX_CUT_TOKENS
    return lambda all: monkeypatch.setattr(kv_cache, "MAX_CUT_TOKENS", 10**9 if all else usual)


@pytest.mark.parametrize("kind", LONG_KINDS)
@pytest.mark.parametrize("bits", [8, 16])
def test_a_token_sees_what_it_sees_if_all_are_kept(kind, bits, keep_all):
    one, other = kind(bits), kind(bits)
    for seed, tokens in enumerate((2048, 1, 1, 2048, 600, 1, 2048, 1, 300, 1)):
        keep_all(False)
        seen = turn(one, tokens, seed)
        assert held(one) <= cache_bytes(WIDE, CAPACITY, torch.bfloat16, bits)
        keep_all(True)
        assert equal(seen, turn(other, tokens, seed))
    assert (one.extent.first, other.extent.first) == (4096, 0)
    assert held(one) < 0.75 * held(other)


@pytest.mark.parametrize("kind", LONG_KINDS)
def test_one_token_after_the_other_takes_no_more_memory(kind):
    cache = kind(16)
    turn(cache, 2048, 0)
    for seed in range(1, 3000):
        store(cache, torch.zeros(2, 1, 8, 32, dtype=torch.bfloat16))
        cache.advance(1)
        if seed % 100 == 0:
            assert held(cache) <= cache_bytes(WIDE, CAPACITY, torch.bfloat16)
    assert cache.extent.first == 2048


@pytest.mark.parametrize("kind", LONG_KINDS)
def test_what_is_cut_back_within_2048_tokens_is_still_there(kind, keep_all):
    one, other = kind(16), kind(16)
    for all_kept, cache in ((False, one), (True, other)):
        keep_all(all_kept)
        for seed in range(3):
            turn(cache, 2048, seed)
    for length in (6143, 4200, 4096):
        assert one.usable(length) == length
        one.cut(length)
        other.cut(length)
        assert equal(turn(one, 1, 9), turn(other, 1, 9))
    least = one.extent.first + 399
    assert (one.usable(least), one.usable(least - 1), one.usable(0)) == (least, 0, 0)
    one.cut(0)
    other.clear()
    assert equal(turn(one, 700, 5), turn(other, 700, 5))
    assert one.extent.first == 0


@needs_kernel
def test_a_new_beginning_takes_the_pages_that_it_needs():
    """It took as many as the whole conversation before had, in each layer with a window."""
    cache = paged(16)
    for seed in range(4):
        turn(cache, 2048, seed)
    cache.cut(0)
    turn(cache, 49, 5)
    assert sum(page.numel() > 0 for page in cache.layers[0]._pages) == 1


@pytest.mark.parametrize("kind", LONG_KINDS)
def test_a_pass_that_is_broken_off_leaves_what_the_next_one_sees(kind, keep_all):
    """It had given back what only the tokens after it did not need."""
    one, other = kind(16), kind(16)
    for all_kept, cache in ((False, one), (True, other)):
        keep_all(all_kept)
        turn(cache, 2048, 0)
        turn(cache, 2000, 1)
        cache.layers[0].store(*torch.zeros(2, 2048, 2, 32, dtype=torch.bfloat16))  # no `advance`
        assert cache.usable(4048) == 4048
    assert equal(turn(one, 1, 2), turn(other, 1, 2))


# All engines here have short windows, and keep whole pages beyond them, but no more.
@pytest.fixture(params=KERNEL)
def load(
    request: pytest.FixtureRequest,
    model_of: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Engine]:
    monkeypatch.setattr(sequence_cache, "kernels_available", lambda: request.param)
    monkeypatch.setattr(kv_cache, "MAX_CUT_TOKENS", 0)

    def load(kind: str = "sinks and biases", **options: Any) -> Engine:
        changes = {"std": 0.1, "max_position_embeddings": 4096, **FAMILIES[kind]}
        directory = model_of({"intermediate_size": 128, **changes}, {})
        given = {"device": "cpu", "exact_prompts": True, "context_size": 3000, **options}
        return load_engine(directory, LoadOptions(**given))

    return load


def test_prompts_that_begin_alike_are_answered_as_by_a_new_engine(load):
    used, prompt = load(), ids_of(1530)
    answer(used, prompt)
    # The end is kept, the middle is not, and what is short is.
    for length, reused in ((1520, 1520), (400, 0), (395, 395), (1530, 395)):
        changed = [*prompt[:length], 3, 4, 5]
        assert answer(used, changed) == answer(load(), changed)
        assert used.stats.reused_tokens == reused


def test_the_next_turn_of_a_saved_conversation_goes_on(load, tmp_path):
    one, prompt = load(), ids_of(1530)
    said = answer(one, prompt)
    assert one.held()[1].extent.first > 0
    assert PromptCache(tmp_path / "f", one).save()
    longer = [*prompt, *said, 7, 8]
    other = load()
    assert PromptCache(tmp_path / "f", other).load() == len(prompt) + len(said) - 1
    assert answer(other, longer) == answer(one, longer)
    assert other.stats.reused_tokens == one.stats.reused_tokens == len(longer) - 3


def test_a_context_that_ends_before_what_was_saved_begins_anew(load, tmp_path):
    one, prompt = load(), ids_of(1530)
    answer(one, prompt)
    assert PromptCache(tmp_path / "f", one).save()
    small = load(context_size=600)
    assert PromptCache(tmp_path / "f", small).load() == 0
    assert small.held()[0] == []
    assert answer(small, prompt[:500]) == answer(load(), prompt[:500])


def test_a_beginning_that_the_file_cannot_give_is_saved_anew(load, tmp_path):
    """The file counted as up to date, so each start computed the beginning again."""
    one, prompt = load(), ids_of(1530)
    answer(one, prompt)
    assert PromptCache(tmp_path / "f", one).save()
    small = load(context_size=600)
    saved = PromptCache(tmp_path / "f", small)
    saved.load()
    answer(small, prompt[:500], max_tokens=1)
    assert small.held()[0] == prompt[:500]
    assert saved.save()
    assert PromptCache(tmp_path / "f", load()).load() == 500
    assert not saved.save()


def test_conversations_at_once_share_what_is_kept(load):
    engine, prompt = load(parallel=3, exact_prompts=True), ids_of(1530)
    starts = [prompt, [*prompt, 5, 6], [*prompt[:1000], 7], [*prompt[:1529], 8, 9]]
    said = []
    for ids in itertools.chain(starts, starts):
        batch = engine.new_batch()
        job = batch.add(TokenAnswer(ids, SamplingOptions(0), frozenset(), 8))
        while batch.size:
            batch.step()
        assert job.error is None
        said.append(job.ids[len(ids) :])
    assert said[:4] == said[4:] == [answer(load(), ids, max_tokens=8) for ids in starts]


def test_speculation_across_a_page_gives_the_same_answers(load):
    text = ids_of(60)
    prompt = [*text * 17, *text[:1]]  # 1,021 tokens, three before a page is full
    options = {"max_tokens": 60}
    assert answer(load(), prompt, **options) == answer(load(speculation=False), prompt, **options)
