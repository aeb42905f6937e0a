"""Chooses the next token from the logits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from typing import Protocol

import torch

from mixchat.options import SamplingOptions

GREEDY_BELOW = 1e-5  # temperatures that would only overflow, and choose the best token anyway
REPEAT_WINDOW = 64  # last tokens that `repeat_penalty` is for, as in llama.cpp and ollama


class Constraint(Protocol):
    """Allows only the tokens that keep an answer in a given form. V = vocab_size."""

    def allowed(self) -> torch.Tensor:
        """Return the tokens that may come next: bool [V], on the CPU; at least one is allowed."""

    def accept(self, token: int) -> None:
        """Take the next token of the answer, which was allowed."""


class Sampler:
    """Draws tokens; with a seed the same logits give the same tokens, on every device.

    The tokens of `stop_ids` get no `repeat_penalty`: a chat's prompt has one at the end of each
    turn, and with a penalty short answers would not end.
    """

    def __init__(self, options: SamplingOptions, stop_ids: Set[int] = frozenset()) -> None:
        self._options, self._stop_ids = options, stop_ids
        self._generator = torch.Generator()
        if options.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(options.seed)

    def sample(self, logits: torch.Tensor, history: Sequence[int]) -> int:
        """Return the next token after `history`. logits: [V], any float type, on the CPU."""
        options = self._options
        logits = logits.float()
        if options.repeat_penalty != 1:
            recent = set(history[-REPEAT_WINDOW:]) - self._stop_ids
            logits = penalize(logits, recent, options.repeat_penalty)
        if options.temperature < GREEDY_BELOW:
            return int(logits.argmax())
        probabilities = filtered_probabilities(logits, options)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


def log_probabilities(
    logits: torch.Tensor, token: int, top: int
) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Return the natural log probability of a token, and the `top` likeliest ones with theirs.

    logits: [V]. Among equals, the smaller token comes first.
    """
    values = logits.float().log_softmax(0)
    order = values.sort(descending=True, stable=True)
    best = zip(order.indices[:top].tolist(), order.values[:top].tolist(), strict=True)
    return float(values[token]), tuple(best)


def penalize(logits: torch.Tensor, recent: Iterable[int], penalty: float) -> torch.Tensor:
    """Divide the positive logits of `recent` tokens by `penalty`, multiply the negative ones."""
    ids = torch.tensor(sorted(set(recent)), dtype=torch.long)
    chosen = logits[ids]
    return logits.index_copy(0, ids, torch.where(chosen > 0, chosen / penalty, chosen * penalty))


def filtered_probabilities(logits: torch.Tensor, options: SamplingOptions) -> torch.Tensor:
    """Return probabilities [V] after temperature, then top-k, top-p and min-p, in that order.

    Each filter is applied to the result of the one before. The best token always stays.
    """
    order = (logits / options.temperature).sort(descending=True, stable=True)
    candidates = order.values
    if 0 < options.top_k < len(candidates):
        candidates = candidates[: options.top_k]
    if options.top_p < 1:
        probabilities = candidates.softmax(0)
        before = probabilities.cumsum(0) - probabilities  # mass of the better ones
        candidates = candidates[before < options.top_p]
    if options.min_p > 0:
        probabilities = candidates.softmax(0)
        candidates = candidates[probabilities >= options.min_p * probabilities[0]]
    result = torch.zeros_like(logits)
    result[order.indices[: len(candidates)]] = candidates.softmax(0)
    return result
