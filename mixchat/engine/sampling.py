"""Choosing the next token from the logits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set

import torch

from mixchat.options import SamplingOptions

GREEDY_BELOW = 1e-5  # temperatures that leave no doubt, and would only overflow
REPEAT_WINDOW = 64  # tokens that `repeat_penalty` looks back on, as llama.cpp and ollama do


class Sampler:
    """Draws tokens; with a seed the same logits give the same tokens, on every device.

    The tokens of `stop_ids` are free of `repeat_penalty`: a chat's prompt has one at the end of
    each turn, and a penalty on these would let short answers ramble on.
    """

    def __init__(self, options: SamplingOptions, stop_ids: Set[int] = frozenset()) -> None:
        self._options, self._stop_ids = options, stop_ids
        self._generator = torch.Generator()
        if options.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(options.seed)

    def sample(self, logits: torch.Tensor, history: Sequence[int]) -> int:
        """The next token after `history`. logits: [V], any float type, on the CPU."""
        options = self._options
        logits = logits.float()
        if options.repeat_penalty != 1:
            recent = set(history[-REPEAT_WINDOW:]) - self._stop_ids
            logits = penalize(logits, recent, options.repeat_penalty)
        if options.temperature < GREEDY_BELOW:
            return int(logits.argmax())
        probabilities = filtered_probabilities(logits, options)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))


def penalize(logits: torch.Tensor, recent: Iterable[int], penalty: float) -> torch.Tensor:
    """Divide the positive logits of `recent` tokens by `penalty`, multiply the negative ones."""
    ids = torch.tensor(sorted(set(recent)), dtype=torch.long)
    chosen = logits[ids]
    return logits.index_copy(0, ids, torch.where(chosen > 0, chosen / penalty, chosen * penalty))


def filtered_probabilities(logits: torch.Tensor, options: SamplingOptions) -> torch.Tensor:
    """Probabilities [V] after temperature, then top-k, top-p and min-p, in that order.

    Each filter sees the distribution that the one before it left. The best token always stays.
    """
    order = (logits / options.temperature).sort(descending=True, stable=True)
    kept = order.values
    if 0 < options.top_k < len(kept):
        kept = kept[: options.top_k]
    if options.top_p < 1:
        probabilities = kept.softmax(0)
        before = probabilities.cumsum(0) - probabilities  # mass of the better ones
        kept = kept[before < options.top_p]
    if options.min_p > 0:
        probabilities = kept.softmax(0)
        kept = kept[probabilities >= options.min_p * probabilities[0]]
    result = torch.zeros_like(logits)
    result[order.indices[: len(kept)]] = kept.softmax(0)
    return result
