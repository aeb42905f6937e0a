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

from mixchat.base.options import SamplingOptions
from mixchat.engine.sampling import (
    Sampler,
    at_share,
    candidates,
    log_probabilities,
    penalize,
    raised,
)


def random_logits(seed: int, size: int = 50) -> torch.Tensor:
    return 3 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def filtered_probabilities(logits: torch.Tensor, options: SamplingOptions) -> torch.Tensor:
    """Return the probabilities [V] of all tokens, 0 for those that are no candidates."""
    ids, probabilities = candidates(logits, options)
    kept = torch.zeros_like(logits)
    kept[slice(None) if ids is None else ids] = probabilities / probabilities.sum()
    return kept


@settings(max_examples=200)
@given(
    st.integers(0, 10**6),
    st.sampled_from([50, 3000]),
    st.floats(0.2, 3),
    st.integers(0, 60),
    st.floats(0.05, 1),
    st.floats(0, 0.9),
)
def test_filters_equal_those_of_transformers(seed, size, temperature, top_k, top_p, min_p):
    logits = random_logits(seed, size)
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


@given(st.lists(st.integers(-2, 2), min_size=1, max_size=300), st.data())
def test_the_best_tokens_come_first_and_of_equal_ones_the_smaller_id(whole, data):
    count = data.draw(st.integers(0, len(whole)))
    ordered = sorted(range(len(whole)), key=lambda token: (-whole[token], token))
    values = torch.tensor(whole).float().log_softmax(0)
    _, best = log_probabilities(torch.tensor(whole).float(), 0, count)
    assert best == tuple((token, float(values[token])) for token in ordered[:count])


def test_tokens_that_a_form_forbids_are_not_among_the_best():
    logits = torch.tensor([-torch.inf, 1.0, -torch.inf, 2.0])
    assert [token for token, _ in log_probabilities(logits, 1, 4)[1]] == [3, 1]
    kept = filtered_probabilities(logits, SamplingOptions(1.0, top_k=3))
    torch.testing.assert_close(kept, logits.softmax(0))


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_top_p_takes_as_many_tokens_as_it_needs(share):
    """Here all are equally likely: of 5,000, that is more than are looked at first."""
    kept = filtered_probabilities(torch.zeros(5000), SamplingOptions(1.0, top_p=share))
    assert abs(int((kept > 0).sum()) - 5000 * share) <= 1


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 1e-50},
        *({"temperature": number} for number in (1e-320, 1e-40, 1e-6, 2e-5, 1e30, 1e39)),
        {"temperature": 1e-40, "repeat_penalty": 0.01},
        {"temperature": 1e-6, "repeat_penalty": 100.0},
    ],
    ids=str,
)
def test_the_best_token_stays_and_a_forbidden_one_is_not_drawn_with_extreme_options(options):
    """Some became 0 or infinite in fp32, all probabilities NaN, and a token was drawn that no
    model has."""
    sampling = SamplingOptions(seed=0, **options)
    for scale in (1, 1000):
        logits = scale * torch.tensor([-torch.inf, 1.0, 5.0])
        if sampling.temperature >= 1e-5:  # a lower one is greedy
            kept = filtered_probabilities(logits, sampling)
            assert kept[0] == 0 < kept[2]
        assert Sampler(sampling).sample(logits, [1]) in (1, 2)


@settings(max_examples=300)
@given(
    st.lists(st.sampled_from([0.0, 0.0, 1e-30, 0.1, 0.25, 3.0]), min_size=1, max_size=300),
    st.floats(0, 1, exclude_max=True),
)
def test_a_token_is_drawn_by_its_share_of_the_sum_of_all(weights, share):
    probabilities = torch.tensor(weights)
    ends = probabilities.cumsum(0, dtype=torch.float64)
    if ends[-1] == 0:
        return
    drawn = at_share(probabilities, share)
    assert probabilities[drawn] > 0
    # Blocks are added up in fp32.
    point, least = share * ends[-1], ends[-1] * 1e-6
    assert ends[drawn] - probabilities[drawn] - least <= point <= ends[drawn] + least


@given(st.integers(1, 300), st.sampled_from([1, 63, 64, 65, 129]))
def test_the_last_token_is_drawn_by_the_largest_share(size, zeros):
    """The sum of a block's numbers, one by one, may be smaller than its share of all."""
    probabilities = torch.cat((torch.rand(size) + 0.1, torch.zeros(zeros)))
    assert at_share(probabilities, 1 - 2**-53) == size - 1


@given(st.integers(0, 10**6), st.floats(0.5, 2), st.lists(st.integers(0, 49), max_size=70))
def test_the_penalty_equals_that_of_transformers(seed, penalty, recent):
    logits = random_logits(seed)
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    expected = processor(torch.tensor([recent], dtype=torch.long), logits[None].clone())[0]
    torch.testing.assert_close(penalize(logits, recent, penalty), expected)


@pytest.mark.parametrize(
    ("recent", "ends", "token"),
    [
        pytest.param([0] + [2] * 63, (), 1, id="a recent token"),
        pytest.param([0] + [2] * 64, (), 0, id="64 tokens ago"),
        pytest.param([0, 2], (), 1, id="any token"),
        pytest.param([0, 2], (0,), 0, id="one that ends answers"),
        pytest.param([0, 2], (0, 2), 0, id="all end answers"),
    ],
)
def test_recent_tokens_are_penalized_unless_they_end_answers(recent, ends, token):
    """The prompt of a chat ends each turn with such a token: with a penalty on it, the demo went on
    after "The capital of France is Paris."."""
    options = SamplingOptions(temperature=0, repeat_penalty=2.0)
    assert Sampler(options, {*ends}).sample(torch.tensor([1.0, 0.9, -9.0]), recent) == token


def draws(seed: int | None, count: int = 30) -> list[int]:
    sampler = Sampler(SamplingOptions(temperature=1.5, seed=seed))
    return [sampler.sample(random_logits(n), []) for n in range(count)]


def test_a_seed_repeats_and_another_does_not():
    assert draws(1) == draws(1)
    assert draws(1) != draws(2)
    assert draws(None) != draws(None)


def test_draws_follow_the_distribution():
    logits = torch.tensor([0.0, 1.0, 2.0]).log1p()
    sampler = Sampler(SamplingOptions(temperature=1.0, seed=0))
    counts = torch.bincount(torch.tensor([sampler.sample(logits, []) for _ in range(6000)]))
    torch.testing.assert_close(counts / 6000, torch.tensor([1, 2, 3]) / 6, rtol=0, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_may_come_in_any_float_type(dtype):
    sampler = Sampler(SamplingOptions(temperature=1.0, top_p=0.9, seed=0))
    assert 0 <= sampler.sample(random_logits(0).to(dtype), []) < 50


def openai_logits(logits: torch.Tensor, answer: list[int], options: SamplingOptions) -> list[float]:
    """OpenAI's formula, token by token: mu[j] - c[j] * frequency - (c[j] > 0) * presence."""
    bias = dict(options.logit_bias)
    return [
        float(logit)
        - answer.count(token) * options.frequency_penalty
        - (token in answer) * options.presence_penalty
        + bias.get(token, 0.0)
        for token, logit in enumerate(logits)
    ]


numbers = st.floats(-2, 2)


@settings(max_examples=50)
@given(
    st.integers(0, 10**6),
    numbers,
    numbers,
    st.dictionaries(st.integers(0, 11), st.floats(-100, 100)),
)
def test_penalties_of_the_answer_and_biases_follow_openais_formula(seed, presence, frequency, bias):
    options = SamplingOptions(
        temperature=0,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias=tuple(bias.items()),
    )
    sampler, answer = Sampler(options), list[int]()
    for step in range(12):
        logits = random_logits(seed + step, 12)
        expected = openai_logits(logits, answer, options)
        token = sampler.sample(logits, [3, 3, 5, *answer])
        assert expected[token] == pytest.approx(max(expected), abs=1e-4)
        answer.append(token)


def test_the_prompts_tokens_get_no_presence_or_frequency_penalty():
    options = SamplingOptions(temperature=0, presence_penalty=2, frequency_penalty=2)
    sampler, logits = Sampler(options), torch.tensor([1.0, 0.5, 0.0])
    assert [sampler.sample(logits, [0, 0, 0]) for _ in range(3)] == [0, 1, 2]


def test_a_bias_for_a_token_that_the_model_lacks_is_ignored():
    assert raised(torch.zeros(2), [(1, 3.0), (7, 5.0)]).tolist() == [0.0, 3.0]


class Script:
    """A constraint that allows the given tokens, one set after the other."""

    def __init__(self, *steps: set[int], size: int = 50) -> None:
        self.steps, self.size = list(steps), size
        self.taken: list[int] = []

    def allowed(self) -> torch.Tensor:
        return torch.tensor([token in self.steps[0] for token in range(self.size)])

    def accept(self, token: int) -> bool:
        assert token in self.steps.pop(0)
        self.taken.append(token)
        return True


@settings(max_examples=50)
@given(
    st.integers(0, 10**6),
    st.lists(st.sets(st.integers(0, 49), min_size=1), min_size=1, max_size=8),
    st.floats(0, 3),
    st.integers(0, 60),
    st.floats(0.05, 1),
    st.floats(0, 0.9),
)
def test_only_allowed_tokens_are_drawn_whatever_the_options(
    seed, steps, temperature, top_k, top_p, min_p
):
    options = SamplingOptions(
        temperature, top_p, top_k, min_p, seed=seed, logit_bias=((0, 100.0),), presence_penalty=2
    )
    constraint = Script(*steps)
    sampler, history = Sampler(options, constraint=constraint), [1, 2]
    for step in range(len(steps)):
        history.append(sampler.sample(random_logits(seed + step), history))
    assert constraint.taken == history[2:]


def test_what_is_forbidden_takes_no_place_among_the_top_k():
    """The mask comes first: else the best tokens, all forbidden, would leave nothing to draw."""
    sampler = Sampler(SamplingOptions(1.0, top_k=1, seed=0), constraint=Script({2}, size=3))
    assert sampler.sample(torch.tensor([9.0, 8.0, 1.0]), []) == 2


@pytest.mark.parametrize("size", [2, 5])
def test_a_vocabulary_of_another_size_than_the_models_is_masked_too(size):
    sampler = Sampler(SamplingOptions(temperature=0), constraint=Script({0, 4}, size=size))
    assert sampler.sample(torch.tensor([1.0, 2.0, 3.0]), []) == 0
