"""Sampling against transformers' logits processors, and its own promises."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mixchat.engine.sampling import Sampler, filtered_probabilities, penalize
from mixchat.options import SamplingOptions


def random_logits(seed: int, size: int = 50) -> torch.Tensor:
    return 3 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 10**6),
    st.floats(0.2, 3),
    st.integers(0, 60),
    st.floats(0.05, 1),
    st.floats(0, 0.9),
)
def test_filters_equal_those_of_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = random_logits(seed)
    scores = TemperatureLogitsWarper(temperature)(None, logits[None])
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    if min_p > 0:
        scores = MinPLogitsWarper(min_p)(None, scores)
    ours = filtered_probabilities(
        logits, SamplingOptions(temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    )
    torch.testing.assert_close(ours, scores[0].softmax(-1), rtol=1e-4, atol=1e-5)


@given(st.integers(0, 10**6), st.floats(0.5, 2), st.lists(st.integers(0, 49), max_size=70))
def test_the_penalty_equals_that_of_transformers(
    seed: int, penalty: float, recent: list[int]
) -> None:
    logits = random_logits(seed)
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    expected = processor(torch.tensor([recent], dtype=torch.long), logits[None].clone())[0]
    torch.testing.assert_close(penalize(logits, recent, penalty), expected)


def test_only_recent_tokens_are_penalized() -> None:
    logits = torch.tensor([1.0, 0.9, -9.0])
    sampler = Sampler(SamplingOptions(temperature=0, repeat_penalty=2.0))
    assert sampler.sample(logits, [0] + [2] * 63) == 1
    assert sampler.sample(logits, [0] + [2] * 64) == 0


def test_a_token_that_ends_answers_is_never_penalized() -> None:
    """The prompt of a chat ends each turn with it: with a penalty on it, the demo went on after
    "The capital of France is Paris."."""
    logits = torch.tensor([1.0, 0.9, -9.0])
    options = SamplingOptions(temperature=0, repeat_penalty=2.0)
    assert Sampler(options).sample(logits, [0, 2]) == 1
    assert Sampler(options, {0}).sample(logits, [0, 2]) == 0
    assert Sampler(options, {0, 2}).sample(logits, [0, 2]) == 0


def test_temperature_zero_takes_the_best() -> None:
    sampler = Sampler(SamplingOptions(temperature=0))
    assert all(
        sampler.sample(random_logits(seed), []) == random_logits(seed).argmax()
        for seed in range(20)
    )


def draws(seed: int | None, count: int = 30) -> list[int]:
    sampler = Sampler(SamplingOptions(temperature=1.5, seed=seed))
    return [sampler.sample(random_logits(n), []) for n in range(count)]


def test_a_seed_repeats_and_another_does_not() -> None:
    assert draws(1) == draws(1)
    assert draws(1) != draws(2)
    assert draws(None) != draws(None)


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0]).log1p()
    sampler = Sampler(SamplingOptions(temperature=1.0, seed=0))
    counts = torch.bincount(torch.tensor([sampler.sample(logits, []) for _ in range(6000)]))
    torch.testing.assert_close(counts / 6000, torch.tensor([1, 2, 3]) / 6, rtol=0, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_may_come_in_any_float_type(dtype: torch.dtype) -> None:
    sampler = Sampler(SamplingOptions(temperature=1.0, top_p=0.9, seed=0))
    assert 0 <= sampler.sample(random_logits(0).to(dtype), []) < 50


@pytest.mark.parametrize("temperature", [1e-320, 1e-40, 1e-6, 2e-5, 1e30])
@pytest.mark.parametrize("penalty", [0.01, 100.0])
def test_extreme_values_still_give_a_token(temperature: float, penalty: float) -> None:
    options = SamplingOptions(temperature=temperature, repeat_penalty=penalty, seed=0)
    assert 0 <= Sampler(options).sample(1000 * random_logits(0), [1, 2, 3]) < 50
