"""Predicts the experts of the next layers, before their routers are reached.

T = tokens, D = hidden_size, E = num_local_experts, K = num_experts_per_tok.

Tokens a second, two rounds by turns, 2 cores, a disk of 1.5 to 2.5 GB/s. In the last columns some
right predictions were replaced by random experts:

| random weights, RAM for experts | no predictions | 3 layers   | a third wrong | half wrong |
| ------------------------------- | -------------- | ---------- | ------------- | ---------- |
| Qwen3, 24 layers, 3 GB          | 5.0, 5.0       | 6.4, 5.8   | 5.0, 4.9      | 4.4, 4.4   |
| Qwen3, 24 layers, 6.2 GB (*)    | 7.3, 8.8       | 10.2, 11.9 |               | 9.5, 9.4   |
| Mixtral, 8 layers, 3.2 GB (*)   | 2.2, 2.6       | 2.7, 2.9   | 2.6, 2.5      | 2.4, 2.4   |

(*) with predicted reads only while fewer than two were in flight, and not four. Six layers ahead
were as fast as three. Wrong predictions cost little because few of them are in flight, and they
take few slots (`tier.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from mixchat.experts.cache import ExpertKey
from mixchat.kernels.cpu.dense import dense_matmul
from mixchat.kernels.cpu.router import Scoring

LAYERS_AHEAD = 3  # whose experts are predicted for one token


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
        self.layers = len(gates)
        self._experts_per_token = experts_per_token

    def __call__(self, layer: int, hidden_states: torch.Tensor, depth: int) -> torch.Tensor:
        """Return the likely choices of the next `depth` layers: [layers, T * K], int64.

        hidden_states: [T, D], as this layer's router sees them.
        """
        first = layer + 1
        last = min(layer + 1 + depth, self.layers)
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
