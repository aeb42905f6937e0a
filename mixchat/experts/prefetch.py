"""Predicts the experts of the next layers, before their routers are reached.

T = tokens, D = hidden_size, E = num_local_experts, K = num_experts_per_tok.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

import torch

from mixchat.experts.cache import ExpertKey, ExpertStats
from mixchat.experts.tuner import Tuner
from mixchat.kernels.cpu.dense import dense_matmul
from mixchat.kernels.cpu.router import Scoring

# Layers to look ahead in decoding, in the order of trying them.
DEPTHS = (3, 6, 0, 1)
_TUNER_ROUND = 2  # tokens


class NextRouters:
    """The next layers' routers, applied to this layer's hidden states.

    Each layer adds little to the hidden states, so the next router sees nearly the same, except for
    the weights of the norms. They are divided out, and the next layer's multiplied in.

    gates: [E, D] of each layer. norms: [D] of each layer, the weights before its router.
    biases: [E] of each layer, if its router has one. corrections: [E] of each layer, if its router
    adds them to the scores, which `scoring` makes of the logits.
    """

    def __init__(
        self,
        gates: Sequence[torch.Tensor],
        norms: Sequence[torch.Tensor],
        experts_per_token: int,
        biases: Sequence[torch.Tensor] = (),
        corrections: Sequence[torch.Tensor] = (),
        scoring: Scoring = "softmax",
    ) -> None:
        weighted = [gate.float() * norm.float() for gate, norm in zip(gates, norms, strict=True)]
        # Rounded, since they are read for each token like a layer's matrices.
        self._gates = torch.cat(weighted).to(gates[0].dtype)  # [layers * E, D]
        self._biases = torch.cat([*biases]).float() if biases else None  # [layers * E]
        self._corrections = torch.stack([*corrections]) if corrections else None  # [layers, E]
        self._scoring = scoring
        # A weight of almost zero has lost its input, which counts as zero.
        self._undo = [torch.where(norm.abs() > 1e-3, 1 / norm.float(), 0) for norm in norms]
        self._experts = gates[0].shape[0]
        self.layers, self._experts_per_token = len(gates), experts_per_token

    def __call__(self, layer: int, hidden_states: torch.Tensor, depth: int) -> torch.Tensor:
        """Return the likely choices of the next `depth` layers: [layers, T * K], int64.

        hidden_states: [T, D], as this layer's router sees them.
        """
        first, last = layer + 1, min(layer + 1 + depth, self.layers)
        if first >= last:
            return hidden_states.new_empty((0, 0), dtype=torch.int64)
        rows = slice(first * self._experts, last * self._experts)
        undone = (hidden_states.float() * self._undo[layer]).to(self._gates.dtype)
        logits = dense_matmul(undone, self._gates[rows]).float()
        if self._biases is not None:
            logits = logits + self._biases[rows]
        logits = logits.view(-1, last - first, self._experts)
        if self._corrections is not None:
            scores = logits.sigmoid() if self._scoring == "sigmoid" else logits.softmax(-1)
            logits = scores + self._corrections[first:last]
        choices = logits.topk(self._experts_per_token).indices
        return choices.transpose(0, 1).flatten(1)


def ranked_keys(layer: int, choices: torch.Tensor) -> list[ExpertKey]:
    """Return the experts of the layers after `layer`, the nearest layer's first.

    In a layer, the experts that most tokens select come first. choices: by `NextRouters`, on the
    CPU.
    """
    return [
        ExpertKey(ahead, expert)
        for ahead, chosen in enumerate(choices.tolist(), start=layer + 1)
        for expert, _ in Counter(chosen).most_common()
    ]


class Prefetch:
    """Decides how many layers to look ahead, so that tokens come fastest.

    In decoding each depth is tried. Wrong predictions keep the disk busy, and even right ones can
    keep the cores from computing. No depth is best everywhere, in tokens a second:

    | weights, bytes a second from disk | 0        | 1    | 3          | 6          | tried      |
    | --------------------------------- | -------- | ---- | ---------- | ---------- | ---------- |
    | a demo's, 300 MB, 40% right       | 14 to 17 | 14   | 8.4        | 5.6 to 5.9 | 14         |
    | random ones, 2 GB, all right      | 3.4      | 4.5  | 4.7 to 6.1 | 5.2 to 6.1 | 4.7 to 5.1 |
    """

    def __init__(self, routers: NextRouters, stats: ExpertStats) -> None:
        self._routers, self._stats = routers, stats
        self.tuner = Tuner(DEPTHS, length=_TUNER_ROUND)
        self._started: tuple[float, int] | None = None
        self._tokens = self._needed = 0

    def predict(self, layer: int, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the choices to prefetch while `layer` is computed."""
        if hidden_states.shape[0] > 1:
            # In a prefill the next layer needs most of its experts, so one layer ahead cannot lose.
            self._started = None
            return self._routers(layer, hidden_states, 1)
        if layer == 0:
            self._started = time.perf_counter(), self._stats.needed
        elif layer == self._routers.layers - 1 and self._started is not None:
            # Record the token's time and its missing experts. Loading is assumed to take half of
            # the time, so a token with twice as many missing experts counts as 1.5 tokens.
            start, needed_at_start = self._started
            needed = self._stats.needed - needed_at_start
            self._tokens += 1
            self._needed += needed
            if self._needed:
                mean = self._needed / self._tokens
                self.tuner.add(time.perf_counter() - start, 0.5 + 0.5 * needed / mean)
            self._started = None
        return self._routers(layer, hidden_states, self.tuner.variant)
