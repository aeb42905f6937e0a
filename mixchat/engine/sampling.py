"""Chooses the next token from the logits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence, Set
from concurrent.futures import Future
from random import Random
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import functional

from mixchat.base.options import SamplingOptions
from mixchat.kernels.cpu.threads import one_thread

# A lower temperature would make logits overflow, and is greedy.
_MIN_TEMPERATURE = 1e-5
# At this one all tokens are equally likely, and no number is too large for fp32.
_MAX_TEMPERATURE = 1e30
_TOP_P_TOKENS = 1024  # tokens that top-p looks at first
_BLOCK = 64  # tokens that are looked at together first
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

    def accept(self, token: int) -> bool:
        """Take the next token of the answer, which was allowed.

        Return False if the answer could not end after it. Then `allowed` returns others.
        """

    def close(self) -> None:
        """Give back what it needs, such as a process. No other method is called after that."""


class Sampler:
    """Draws an answer's tokens. With a seed the same logits give the same tokens on every device.

    The tokens of `stop_ids` get no `repeat_penalty`. The penalties for presence and frequency count
    the tokens that this sampler drew.
    """

    def __init__(
        self,
        options: SamplingOptions,
        stop_ids: Set[int] = frozenset(),
        constraint: Constraint | None = None,
    ) -> None:
        self._options = options
        self._stop_ids = stop_ids
        self._constraint = constraint
        self._counts: Counter[int] = Counter()
        self._random = Random(options.seed)

    @one_thread()
    def sample(self, logits: torch.Tensor, history: Sequence[int]) -> int:
        """Return the next token after `history`. logits: [V], any float type, on the CPU."""
        options = self._options
        logits = logits.float()
        if options.repeat_penalty != 1:
            # With a penalty for stop tokens, short answers would not end.
            recent = set(history[-_REPEAT_PENALTY_TOKENS:]) - self._stop_ids
            logits = penalize(logits, recent, options.repeat_penalty)
        if options.presence_penalty or options.frequency_penalty:
            presence = options.presence_penalty
            frequency = options.frequency_penalty
            logits = raised(
                logits, [(i, -presence - n * frequency) for i, n in self._counts.items()]
            )
        if options.logit_bias:
            logits = raised(logits, options.logit_bias)
        token = self._drawn(logits)
        while self._constraint is not None and not self._constraint.accept(token):
            token = self._drawn(logits)
        self._counts[token] += 1
        return token

    def _drawn(self, logits: torch.Tensor) -> int:
        """Return a token that the constraint allows. logits: [V], fp32."""
        # Last, so that no bias allows a token that the constraint forbids.
        if self._constraint is not None and (mask := self._constraint.allowed()) is not None:
            logits = only(logits, mask)
        if self._options.temperature < _MIN_TEMPERATURE:
            return int(logits.numpy().argmax())  # several times as fast as torch's
        ids, probabilities = candidates(logits, self._options)
        index = at_share(probabilities, self._random.random())
        return index if ids is None else int(ids[index])


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
    """Return logits [V] with -inf for tokens that are not `allowed`, or lie beyond its end."""
    size = min(len(allowed), len(logits))
    masked = torch.full_like(logits, -torch.inf)
    masked[:size] = logits[:size].masked_fill(~allowed[:size], -torch.inf)
    return masked


def penalize(logits: torch.Tensor, recent: Iterable[int], penalty: float) -> torch.Tensor:
    """Divide the positive logits of `recent` tokens by `penalty`, multiply the negative ones."""
    ids = torch.tensor(sorted(set(recent)), dtype=torch.long)
    chosen = logits[ids]
    return logits.index_copy(0, ids, torch.where(chosen > 0, chosen / penalty, chosen * penalty))


def at_share(probabilities: torch.Tensor, share: float) -> int:
    """Return the first index up to which probabilities add up to more than a share of their sum.

    probabilities: [n]. share: below 1.
    """
    # By blocks, since summing the numbers one by one takes several times as long.
    blocks = _in_blocks(probabilities, 0).numpy()
    ends = blocks.sum(1).cumsum(dtype=np.float64)
    assert ends[-1] > 0, "not of numbers"
    point = share * ends[-1]
    block = int(ends.searchsorted(point, side="right"))
    inner = blocks[block].cumsum(dtype=np.float64)
    start = ends[block - 1] if block else 0.0
    # The two sums of a block may differ in their last bits.
    point = min(point - start, np.nextafter(inner[-1], 0.0))
    return block * _BLOCK + int(inner.searchsorted(point, side="right"))


def candidates(
    logits: torch.Tensor, options: SamplingOptions
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Return the tokens that temperature, top-k, top-p and min-p leave, and their probabilities.

    logits: [V]. Both results are [n], in the order of the ids, and None stands for all ids. The
    probabilities need not add up to 1. The best token always stays.
    """
    ids: torch.Tensor | None = None
    if 0 < options.top_k < len(logits):
        ids = _best(logits, options.top_k)
        logits = logits[ids]
    # By numpy, whose operations take half as long as torch's if the weights that a token has read
    # have replaced their code in the caches.
    weights = logits.numpy() - logits.numpy().max()
    weights *= np.float32(1 / min(options.temperature, _MAX_TEMPERATURE))
    probabilities = torch.from_numpy(np.exp(weights, out=weights))
    if options.top_p < 1:
        probabilities /= probabilities.sum()
        if ids is None:
            ids = _best(logits, min(_TOP_P_TOKENS, len(logits)))
            # Sorting all tokens takes ten times as long, and is seldom needed.
            if probabilities[ids].sum() < options.top_p:
                ids = _best(logits, len(logits))
            probabilities = probabilities[ids]
        kept = probabilities.cumsum(0) - probabilities < options.top_p
        kept[0] = True  # top_p may be 0 in fp32
        ids = ids[kept]
        probabilities = probabilities[kept]
    if options.min_p > 0:
        kept = probabilities >= options.min_p * probabilities.max()
        ids = kept.nonzero()[:, 0] if ids is None else ids[kept]
        probabilities = probabilities[kept]
    if ids is None:
        return None, probabilities
    # In the order of the ids, so that a seed gives the same token by each of these ways.
    ids, order = ids.sort()
    return ids, probabilities[order]


def _best(logits: torch.Tensor, count: int) -> torch.Tensor:
    """Return the ids of the largest finite logits, the best first. Equals keep their order."""
    if not count:
        return torch.empty(0, dtype=torch.int64)
    # The best logits of `count` blocks are not below `least`, so `count` tokens or more are kept.
    bests = _in_blocks(logits, -torch.inf).amax(1) if count * _BLOCK <= len(logits) else logits
    least = bests.topk(count).values[-1].clamp(min=torch.finfo(logits.dtype).min)
    ids = (logits >= least).nonzero()[:, 0]
    return ids[logits[ids].sort(descending=True, stable=True).indices[:count]]


def _in_blocks(values: torch.Tensor, padding: float) -> torch.Tensor:
    """Return values [n] as [blocks, _BLOCK]. The last block is filled up with `padding`."""
    missing = -len(values) % _BLOCK
    whole = functional.pad(values, (0, missing), value=padding) if missing else values
    return whole.view(-1, _BLOCK)
