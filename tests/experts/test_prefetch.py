"""Predictions of the next layers' experts: against a slow reference, and how far ahead pays.

T = tokens, D = hidden_size, E = num_local_experts, K = num_experts_per_tok, L = layers.
"""

from collections import Counter
from collections.abc import Mapping
from itertools import product
from statistics import mean
from typing import Any

import pytest
import torch

from mixchat.experts import prefetch
from mixchat.experts.cache import ExpertKey, ExpertStats
from mixchat.experts.prefetch import DEPTHS, NextRouters, Prefetch, ranked_keys
from mixchat.kernels.cpu.router import Scoring

L, E, D, K = 5, 8, 32, 2


class Case:
    """Random routers and norms, and a stream of hidden states as the layers see it."""

    def __init__(
        self,
        seed: int,
        tokens: int,
        dtype: torch.dtype = torch.float32,
        *,
        biased: bool = False,
        corrected: Scoring | None = None,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.gates = [torch.randn(E, D, generator=generator).to(dtype) for _ in range(L)]
        self.norms = [
            (0.3 + torch.rand(D, generator=generator)).to(dtype)
            * torch.where(torch.rand(D, generator=generator) < 0.3, -1, 1)
            for _ in range(L)
        ]
        self.biases = [torch.randn(E, generator=generator) for _ in range(L if biased else 0)]
        self.scoring: Scoring = corrected or "softmax"
        self.corrections = [torch.randn(E, generator=generator) for _ in range(L)]
        self.corrections = self.corrections if corrected else []
        stream = torch.randn(tokens, D, generator=generator)
        self.normed = stream / stream.pow(2).mean(-1, keepdim=True).sqrt()

    def predicted(
        self, layer: int, depth: int, hidden: torch.Tensor | None = None
    ) -> list[ExpertKey]:
        hidden = self.hidden(layer) if hidden is None else hidden
        routers = NextRouters(
            self.gates, self.norms, K, self.biases, self.corrections, self.scoring
        )
        return ranked_keys(layer, routers(layer, hidden, depth))

    def hidden(self, layer: int) -> torch.Tensor:
        return self.normed.to(self.norms[layer].dtype) * self.norms[layer]

    def slow(self, layer: int, depth: int) -> list[ExpertKey]:
        """Each layer's router on the stream as it is now, token by token, counted by hand."""
        keys = []
        for ahead in range(layer + 1, min(layer + depth, L - 1) + 1):
            counts: Counter[int] = Counter()
            for token in self.normed.double():
                logits = self.gates[ahead].double() @ (token * self.norms[ahead].double())
                if self.biases:
                    logits += self.biases[ahead]
                if self.corrections:
                    is_sigmoid = self.scoring == "sigmoid"
                    logits = logits.sigmoid() if is_sigmoid else logits.softmax(-1)
                    logits += self.corrections[ahead]
                for expert in logits.argsort(descending=True)[:K].tolist():
                    counts[expert] += 1
            keys += [ExpertKey(ahead, expert) for expert, _ in counts.most_common()]
        return keys


@pytest.mark.parametrize("corrected", [None, "softmax", "sigmoid"])
@pytest.mark.parametrize("biased", [False, True])
def test_they_are_what_the_next_routers_would_choose_now(biased, corrected):
    for tokens, depth in product((1, 2, 7), (0, 1, 3, 9)):
        case = Case(depth, tokens, biased=biased, corrected=corrected)
        for layer in range(L):
            predicted = case.predicted(layer, depth)
            assert predicted == case.slow(layer, depth)
            assert {key.layer for key in predicted} == set(range(layer + 1, L)[:depth])


def test_in_bf16_nearly_all_predictions_are_the_same():
    same = 0
    for seed in range(40):
        case = Case(seed, tokens=1, dtype=torch.bfloat16)
        predicted = case.predicted(0, 3)
        same += len(set(predicted) & set(case.slow(0, 3)))
    assert same >= 0.9 * 40 * 3 * K


@pytest.mark.parametrize("tiny", [0.0, -1e-5])
def test_what_a_norm_has_all_but_taken_out_counts_as_nothing(tiny):
    for seed in range(5):
        case = Case(seed, tokens=4)
        case.norms[1][3:9] = tiny
        hidden = case.hidden(1)
        predicted = case.predicted(1, 3, hidden)
        case.normed[:, 3:9] = 0
        assert predicted == case.slow(1, 3)


class Routers:
    """Notes how far ahead it was asked to look."""

    layers = 4

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def __call__(self, layer: int, hidden_states: torch.Tensor, depth: int) -> torch.Tensor:
        self.asked.append((layer, depth))
        return torch.zeros(depth, 1, dtype=torch.int64)


class Decoding:
    """Decodes tokens that take as long as the test says, on a clock of its own."""

    def __init__(self) -> None:
        self.stats, self.routers, self.now = ExpertStats(), Routers(), 1000.0
        routers: Any = self.routers
        self.prefetch = Prefetch(routers, self.stats)

    def perf_counter(self) -> float:
        return self.now

    @property
    def costs(self) -> dict[int, float]:
        """Return the cost of a token, by the depth."""
        return dict(zip(DEPTHS, map(mean, self.prefetch.tuner._costs), strict=True))

    def token(self, seconds: Mapping[int, float], needed: int = 6, right: int = 0) -> int:
        """A token takes so long, by the depth. Of what it needs, `right` were predicted in time.

        Returns how far ahead was looked.
        """
        self.prefetch.predict(0, torch.zeros(1, D))
        _, depth = self.routers.asked[-1]
        self.now += seconds[depth]
        self.stats.misses[ExpertKey(0, 0)] += needed - (right if depth else 0)
        self.stats.right_predictions += right if depth else 0
        for layer in range(1, 4):
            self.prefetch.predict(layer, torch.zeros(1, D))
        return depth

    def tokens(self, count: int, seconds: Mapping[int, float]) -> list[int]:
        return [self.token(seconds) for _ in range(count)]


@pytest.fixture
def decoding(monkeypatch: pytest.MonkeyPatch) -> Decoding:
    decoding = Decoding()
    monkeypatch.setattr(prefetch, "time", decoding)
    return decoding


SAME = dict.fromkeys(DEPTHS, 1.0)


@pytest.mark.parametrize("best", DEPTHS)
def test_it_keeps_to_the_depth_with_which_tokens_come_fastest(decoding, best):
    depths = decoding.tokens(1600, {depth: 1 + (depth != best) for depth in DEPTHS})
    assert set(depths) == set(DEPTHS)
    assert depths[800:].count(best) > 0.8 * 800


def test_it_switches_itself_off_where_predictions_cost_more_and_on_again(decoding):
    others = sorted(set(DEPTHS) - {0})
    off = decoding.tokens(1600, {0: 1.0} | {depth: 2.0 for depth in others})
    assert off[-800:].count(0) > 0.8 * 800
    on = decoding.tokens(6000, {0: 3.0} | {depth: 1.0 for depth in others})
    assert on[-800:].count(0) < 0.2 * 800


def test_a_token_that_needs_more_counts_for_more_whatever_was_predicted(decoding):
    """Tokens of all kinds cost the same where half of the time goes into what is needed."""
    for number in range(4800):
        needed = 12 if number // 20 % 2 else 4  # 8 on average, but not in each round
        decoding.token(dict.fromkeys(DEPTHS, 0.5 + 0.5 * needed / 8), needed, right=3)
    assert decoding.costs == pytest.approx(SAME, rel=0.1)


def test_time_before_and_between_tokens_does_not_count(decoding):
    for _ in range(800):
        decoding.now += 1000
        decoding.token(SAME)
    assert decoding.costs == pytest.approx(SAME)


def test_a_prefill_looks_one_layer_ahead_and_does_not_count(decoding):
    for _ in range(300):
        decoding.tokens(3, SAME)
        decoding.prefetch.predict(0, torch.zeros(1, D))  # a token that was interrupted
        decoding.routers.asked.clear()
        for layer in range(4):
            choices = decoding.prefetch.predict(layer, torch.zeros(5, D))
            assert ranked_keys(layer, choices) == [ExpertKey(layer + 1, 0)]
            decoding.stats.misses[ExpertKey(0, 0)] += 100
            decoding.now += 70
        assert decoding.routers.asked == [(layer, 1) for layer in range(4)]
        decoding.prefetch.predict(3, torch.zeros(1, D))  # the end of nothing that was started
    assert decoding.costs == pytest.approx(SAME)


def test_where_nothing_is_needed_nothing_changes(decoding):
    assert {decoding.token(SAME, needed=0) for _ in range(500)} == {DEPTHS[0]}
