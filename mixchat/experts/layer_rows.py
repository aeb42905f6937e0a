"""The rows of one layer for each expert, and the experts' outputs.

T = tokens, D = hidden_size, K = num_experts_per_tok, n = rows of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from mixchat.experts.cache import ExpertKey
from mixchat.kernels.cpu import rows


class LayerRows:
    """One call of a layer's experts. Each expert is to be used once, with all of its rows.

    hidden_states: [T, D]. selected: [T, K], int64, on the CPU. counts: the rows of each expert,
    those with the most rows first. memory: the outputs, [T * K, D], expert by expert. What an
    earlier call used is used again if it fits.
    """

    def __init__(
        self,
        layer: int,
        hidden_states: torch.Tensor,
        selected: torch.Tensor,
        *,
        exact: bool = False,
        memory: torch.Tensor | None = None,
    ) -> None:
        self.layer = layer
        self.hidden_states = hidden_states
        self.exact = exact
        device, (tokens, choices) = hidden_states.device, selected.shape
        if self.is_one_token:
            experts = selected[0].tolist()
            counts = [1] * choices
        else:
            counted = selected.flatten().bincount()
            by_count = counted.argsort(descending=True, stable=True)
            experts = by_count.tolist()
            counts = counted[by_count].tolist()
            # The flattened selection, expert by expert.
            order = by_count.argsort()[selected.flatten()].argsort(stable=True)
            self._tokens = (order // choices).to(device, non_blocking=True)
            self._places = order.argsort().view(tokens, choices).to(device, non_blocking=True)
        pairs = zip(experts, counts, strict=True)
        self.counts = {ExpertKey(layer, expert): count for expert, count in pairs if count}
        ends = accumulate(self.counts.values())
        self._parts = {
            key: slice(end - self.counts[key], end)
            for key, end in zip(self.counts, ends, strict=True)
        }
        shape = tokens * choices, hidden_states.shape[-1]
        if memory is None or memory.shape != shape:
            with torch.inference_mode(False):  # a later call may be outside of it
                memory = torch.empty(shape, dtype=hidden_states.dtype, device=device)
        self.memory = memory

    @property
    def is_one_token(self) -> bool:
        """Return whether all experts get the same row."""
        return self.hidden_states.shape[0] == 1

    @property
    def outputs(self) -> torch.Tensor:
        """Return all outputs [T * K, D], each token's in the order of its choices."""
        return self.memory if self.is_one_token else self.memory[self._places.flatten()]

    def of(self, *keys: ExpertKey) -> torch.Tensor:
        """Return the rows of an expert [n, D], or of several, on the hidden states' device."""
        if self.is_one_token:
            return self.hidden_states
        return self.hidden_states[self.tokens_of(keys)]

    def tokens_of(self, keys: Sequence[ExpertKey]) -> torch.Tensor:
        """Return the numbers of the rows of an expert, or of several, [n]."""
        if self.is_one_token:
            return torch.zeros(len(keys), dtype=torch.int64)
        return torch.cat([self._tokens[self._parts[key]] for key in keys])

    def output_of(self, key: ExpertKey) -> torch.Tensor:
        """Return an expert's place for its output [n, D], on the hidden states' device."""
        return self.memory[self._parts[key]]

    def put(self, key: ExpertKey, output: torch.Tensor) -> None:
        """Store an expert's output [n, D], from any device."""
        self.output_of(key).copy_(output, non_blocking=True)

    def combine(self, routing_weights: torch.Tensor) -> torch.Tensor:
        """Return [T, D]: each token's outputs, weighted by routing_weights [T, K], float32."""
        if self.is_one_token:
            return rows.weighted_sum(self.memory.unsqueeze(0), routing_weights)
        return rows.weighted_sum(self.memory, routing_weights, self._places)
