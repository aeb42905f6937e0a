"""The rows of one layer for each expert, and the experts' outputs.

T = tokens, D = hidden_size, K = num_experts_per_tok, n = rows of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mixchat.experts.cache import ExpertKey
from mixchat.kernels import rows


class LayerRows:
    """One call of a layer's experts. Each expert is to be used once, with all of its rows.

    hidden_states: [T, D]. selected: [T, K], int64, on their device. on_cpu: the same on the CPU.
    copy: the hidden states on the CPU, if they were read. outputs: [T * K, D], with the K outputs
    of a token in the order of its choices.
    """

    def __init__(
        self,
        layer: int,
        hidden_states: torch.Tensor,
        selected: torch.Tensor,
        on_cpu: torch.Tensor,
        copy: torch.Tensor | None = None,
        *,
        exact: bool = False,
    ) -> None:
        self.layer, self.hidden_states, self.exact = layer, hidden_states, exact
        self._selected, self._copy = selected, copy
        self._places: dict[ExpertKey, list[int]] = {}  # in the flattened selection
        for place, expert in enumerate(on_cpu.flatten().tolist()):
            self._places.setdefault(ExpertKey(layer, expert), []).append(place)
        self.counts = {key: len(places) for key, places in self._places.items()}
        self._by_key: dict[ExpertKey, torch.Tensor] = {}
        tokens, self._choices = selected.shape
        self.outputs = hidden_states.new_empty(tokens * self._choices, hidden_states.shape[-1])

    @property
    def is_one_token(self) -> bool:
        """Return whether all experts get the same row."""
        return self.hidden_states.shape[0] == 1

    def of(self, key: ExpertKey) -> torch.Tensor:
        """Return an expert's rows [n, D], on the device of the hidden states."""
        if self.is_one_token:
            return self.hidden_states
        return self.hidden_states[self._indices(key) // self._choices]

    def gathered(self, keys: Sequence[ExpertKey]) -> torch.Tensor:
        """Return these experts' rows [N, D], of one after the other."""
        return self.hidden_states[self._all_indices(keys) // self._choices]

    def on_cpu(self, key: ExpertKey) -> torch.Tensor:
        """Return an expert's rows [n, D] on the CPU. This may wait for a GPU."""
        if self.is_one_token and self._copy is not None:
            return self._copy
        return self.of(key).cpu()

    def put(self, key: ExpertKey, output: torch.Tensor) -> None:
        """Store an expert's output [n, D], from any device."""
        if self.is_one_token:
            self.outputs[self._places[key][0]] = output[0]
        else:
            output = output.to(self.outputs.device, non_blocking=True)
            self.outputs[self._indices(key)] = output

    def put_all(self, keys: Sequence[ExpertKey], outputs: torch.Tensor) -> None:
        """Store the outputs [N, D] for `gathered` rows."""
        self.outputs[self._all_indices(keys)] = outputs

    def _all_indices(self, keys: Sequence[ExpertKey]) -> torch.Tensor:
        return torch.cat([self._indices(key) for key in keys])

    def combine(self, routing_weights: torch.Tensor) -> torch.Tensor:
        """Return [T, D]: each token's outputs, weighted by routing_weights [T, K], float32."""
        outputs = self.outputs.view(*self._selected.shape, -1)
        return rows.weighted_sum(outputs, routing_weights)

    def _indices(self, key: ExpertKey) -> torch.Tensor:
        """Return an expert's places [n], without waiting for the device."""
        if not self._by_key:
            keys = sorted(self.counts)
            order = self._selected.flatten().argsort(stable=True)
            parts = torch.split(order, [self.counts[key] for key in keys])
            self._by_key = dict(zip(keys, parts, strict=True))
        return self._by_key[key]
