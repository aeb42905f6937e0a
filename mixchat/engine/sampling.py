"""Chooses the next token from the logits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence, Set
from concurrent.futures import Future
from typing import Any, Protocol

import torch

from mixchat.base.options import SamplingOptions

_MIN_TEMPERATURE = 1e-5  # a lower one would only overflow
_MAX_TEMPERATURE = 1e30  # all tokens are equally likely, and no number is too large for fp32
_TOP_P_TOKENS = 1024  # tokens that top-p looks at first
_REPEAT_PENALTY_TOKENS = 64  # last tokens, as in llama.cpp and ollama


class Constraint(Protocol):
    """Allows only the tokens that keep an answer in a given form. V = vocab_size."""

    @property
    def compiled(self) -> Future[Any]:
        """Return a future that is done once `allowed` does not have to wait."""

    def allowed(self) -> torch.Tensor | None:
        """Return the tokens that may come next, bool [V] on the CPU, None for all tokens.

        Raises `UsageError` if there are none.
        """

    def accept(self, token: int) -> None:
        """Take the next token of the answer."""


class Sampler:
    """Draws an answer's tokens. With a seed the same logits give the same tokens on every device.

    The tokens of `stop_ids` get no `repeat_penalty`, or short answers would not end. The penalties
    for presence and frequency count the tokens that this sampler drew.
    """

    def __init__(
        self,
        options: SamplingOptions,
        stop_ids: Set[int] = frozenset(),
        constraint: Constraint | None = None,
    ) -> None:
        self._options, self._stop_ids, self._constraint = options, stop_ids, constraint
        self._counts: Counter[int] = Counter()
        self._generator = torch.Generator()
        if options.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(options.seed)

    def sample(self, logits: torch.Tensor, history: Sequence[int]) -> int:
        """Return the next token after `history`. logits: [V], any float type, on the CPU."""
        token = self._draw(self._adjusted(logits.float(), history))
        self._counts[token] += 1
        if self._constraint is not None:
            self._constraint.accept(token)
        return token

    def _adjusted(self, logits: torch.Tensor, history: Sequence[int]) -> torch.Tensor:
        """Return logits [V] with penalties and biases, -inf for what is forbidden."""
        options = self._options
        if options.repeat_penalty != 1:
            recent = set(history[-_REPEAT_PENALTY_TOKENS:]) - self._stop_ids
            logits = penalize(logits, recent, options.repeat_penalty)
        if options.presence_penalty or options.frequency_penalty:
            presence, frequency = options.presence_penalty, options.frequency_penalty
            logits = raised(
                logits, [(i, -presence - n * frequency) for i, n in self._counts.items()]
            )
        if options.logit_bias:
            logits = raised(logits, options.logit_bias)
        if self._constraint is not None and (mask := self._constraint.allowed()) is not None:
            logits = only(logits, mask)
        return logits

    def _draw(self, logits: torch.Tensor) -> int:
        if self._options.temperature < _MIN_TEMPERATURE:
            return int(logits.argmax())
        probabilities = filtered_probabilities(logits, self._options)
        # It takes a tenth of the time of `torch.multinomial`.
        cumulative = probabilities.cumsum(0, dtype=torch.float64)
        assert cumulative[-1] > 0, "not of numbers"
        point = torch.rand(1, dtype=torch.float64, generator=self._generator) * cumulative[-1]
        return int(torch.searchsorted(cumulative, point, right=True))


def log_probabilities(
    logits: torch.Tensor, token: int, top: int
) -> tuple[float, tuple[tuple[int, float], ...]]:
    """Return the natural log probability of a token, and the `top` likeliest tokens with theirs.

    logits: [V]. Among equals, the smaller token comes first.
    """
    values = logits.float().log_softmax(0)
    best = _best(values, min(top, len(values)))
    return float(values[token]), tuple(zip(best.tolist(), values[best].tolist(), strict=True))


def raised(logits: torch.Tensor, amounts: Sequence[tuple[int, float]]) -> torch.Tensor:
    """Add an amount to each token's logit [V]. Unknown tokens are ignored."""
    known = [(token, amount) for token, amount in amounts if token < len(logits)]
    ids = torch.tensor([token for token, _ in known], dtype=torch.long)
    return logits.index_add(0, ids, logits.new_tensor([amount for _, amount in known]))


def only(logits: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """Return logits [V] with -inf for each token that is not `allowed`. None beyond its end is."""
    size = min(len(allowed), len(logits))
    masked = torch.full_like(logits, -torch.inf)
    masked[:size] = logits[:size].masked_fill(~allowed[:size], -torch.inf)
    return masked


def penalize(logits: torch.Tensor, recent: Iterable[int], penalty: float) -> torch.Tensor:
    """Divide the positive logits of `recent` tokens by `penalty`, multiply the negative ones."""
    ids = torch.tensor(sorted(set(recent)), dtype=torch.long)
    chosen = logits[ids]
    return logits.index_copy(0, ids, torch.where(chosen > 0, chosen / penalty, chosen * penalty))


def filtered_probabilities(logits: torch.Tensor, options: SamplingOptions) -> torch.Tensor:
    """Return probabilities [V] after temperature, then top-k, top-p and min-p.

    The best token always stays.
    """
    scaled = logits / min(options.temperature, _MAX_TEMPERATURE)
    probabilities = scaled.softmax(0)
    if 0 < options.top_k < len(logits):
        probabilities = _only_at(_best(scaled, options.top_k), probabilities)
    if options.top_p < 1:
        probabilities = _only_at(_nucleus(scaled, probabilities, options.top_p), probabilities)
    if options.min_p > 0:
        likely = probabilities >= options.min_p * probabilities.max()
        probabilities = _only_at(likely, probabilities)
    return probabilities


def _only_at(kept: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
    """Return probabilities [V] that are 0 but for `kept`, ids or a mask."""
    result = torch.zeros_like(probabilities)
    result[kept] = probabilities[kept]
    return result / result.sum()


def _nucleus(scaled: torch.Tensor, probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Return the ids of the fewest best tokens that have the probability `top_p` together."""
    # Sorting all tokens takes ten times as long.
    for count in (_TOP_P_TOKENS, len(scaled)):
        ids = _best(scaled, min(count, len(scaled)))
        mass = probabilities[ids].cumsum(0)
        if mass[-1] >= top_p:
            break
    kept = mass - probabilities[ids] < top_p
    kept[0] = True  # top_p may be 0 in fp32
    return ids[kept]


def _best(scaled: torch.Tensor, count: int) -> torch.Tensor:
    """Return the ids of the largest finite logits, the best first. Equals keep their order."""
    if not count:
        return torch.empty(0, dtype=torch.int64)
    least = scaled.topk(count).values[-1].clamp(min=torch.finfo(scaled.dtype).min)
    ids = (scaled >= least).nonzero()[:, 0]
    return ids[scaled[ids].sort(descending=True, stable=True).indices[:count]]
