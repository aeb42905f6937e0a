"""Predictions of the next layers' experts, against a slow reference.

T = tokens, D = hidden_size, E = num_local_experts, K = num_experts_per_tok, L = layers.
"""

from collections import Counter
from itertools import product

import pytest
import torch

from mixchat.experts.cache import ExpertKey
from mixchat.experts.prefetch import NextRouters, ranked_keys
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
