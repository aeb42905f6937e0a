"""Computes the experts that a layer's router chose, bringing them into the cache as needed.

T = tokens, D = hidden_size, I = intermediate_size, K = num_experts_per_tok.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch.nn import functional

from mixchat import interrupts
from mixchat.experts.fetcher import MISSING, Fetcher
from mixchat.experts.host_compute import HostCompute
from mixchat.experts.keys import ExpertKey
from mixchat.experts.prefetch import Prefetch
from mixchat.kernels import rows
from mixchat.weights.format.blueprint import Expert

AHEAD = 2  # experts on their way while one is computed


class ExpertRunner(Protocol):
    """Whatever computes experts; the model does not know where they are."""

    def run(
        self,
        layer: int,
        hidden_states: torch.Tensor,
        selected_experts: torch.Tensor,
        routing_weights: torch.Tensor,
    ) -> torch.Tensor:
        """The weighted sum of the chosen experts, for each token.

        hidden_states: [T, D]; selected_experts: [T, K], int64; routing_weights: [T, K], float32.
        Returns [T, D] in the type of hidden_states.
        """


class CachedExpertRunner:
    """Runs experts out of slots that a `Fetcher` fills; two slots are enough.

    Every expert is touched once a call, with all of its tokens. Those in their slots go first: else
    a prefill that walks through more experts than there are slots would evict each just before its
    turn. While one is computed, the next ones are on their way, and after them those that
    `prefetch` expects. The order does not show in the result, because the K outputs of a token are
    kept apart until all are there, and then summed in the order of its choices.
    """

    def __init__(
        self, fetcher: Fetcher, prefetch: Prefetch | None = None, host: HostCompute | None = None
    ) -> None:
        self._fetcher, self._prefetch, self._host = fetcher, prefetch, host

    def run(
        self,
        layer: int,
        hidden_states: torch.Tensor,
        selected_experts: torch.Tensor,
        routing_weights: torch.Tensor,
    ) -> torch.Tensor:
        tokens, choices = selected_experts.shape
        outputs = hidden_states.new_empty(tokens * choices, hidden_states.shape[-1])
        places = _places(layer, selected_experts)
        self._fetcher.settle(layer, places)
        here = self._computed_here(places)
        by_state = sorted(places, key=self._fetcher.state)
        # What is computed on the CPU comes second: a GPU then has its own work meanwhile.
        order = sorted(by_state, key=lambda key: key not in here and not self._fetcher.holds(key))
        for turn, key in enumerate(order):
            interrupts.check()
            self._send_for([other for other in order[turn:] if other not in here])
            if turn == 0:
                self._look_ahead(layer, hidden_states, order)
            if tokens == 1:  # decode: nothing to gather
                outputs[places[key][0]] = self._output(key, hidden_states, key in here)[0]
                continue
            index = torch.tensor(places[key], device=outputs.device)  # [n], into T * K
            outputs[index] = self._output(key, hidden_states[index // choices], key in here)
        return weighted_sum(outputs.view(tokens, choices, -1), routing_weights)

    def _computed_here(self, places: Mapping[ExpertKey, Sequence[int]]) -> set[ExpertKey]:
        """What of the experts that have no slot is to be computed on the CPU."""
        if self._host is None:
            return set()
        missing = {
            key: len(at) for key, at in places.items() if self._fetcher.state(key) == MISSING
        }
        return set(self._host.choose(missing))

    def _send_for(self, keys: Sequence[ExpertKey]) -> None:
        ahead = min(AHEAD, self._fetcher.slots - 1)
        self._fetcher.want(keys[: 1 + ahead])

    def _look_ahead(
        self, layer: int, hidden_states: torch.Tensor, pinned: Sequence[ExpertKey]
    ) -> None:
        if self._prefetch is not None and not self._fetcher.holds_all:
            guesses = self._prefetch.guess(layer, hidden_states)
            self._fetcher.guess(guesses, pinned)

    def _output(self, key: ExpertKey, x: torch.Tensor, here: bool) -> torch.Tensor:
        if here and self._host is not None:
            result = self._host.run(key, x.to("cpu"))
            if result is not None:
                self._fetcher.stats.misses[key] += 1
                return result.to(x.device)
            self._send_for([key])
        return compute(self._fetcher.ready(key), x)


def _places(layer: int, selected: torch.Tensor) -> dict[ExpertKey, list[int]]:
    """Each chosen expert with the places, in the flattened `selected`, that chose it."""
    places: dict[ExpertKey, list[int]] = {}
    for place, expert in enumerate(selected.flatten().tolist()):
        places.setdefault(ExpertKey(layer, expert), []).append(place)
    return places


def compute(expert: Expert, x: torch.Tensor) -> torch.Tensor:
    """w2(silu(w1 x) * w3 x) for x [n, D]."""
    gate_up = expert.w13(x)  # [n, 2 * I]
    if rows.computes(gate_up, gate_up.shape[-1] // 2):
        return expert.w2(rows.gated(gate_up))
    gate, up = gate_up.chunk(2, dim=-1)
    return expert.w2(functional.silu(gate) * up)


def weighted_sum(outputs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The sum [T, D] of outputs [T, K, D] times weights [T, K], in the type of the outputs."""
    if rows.computes(outputs, outputs.shape[-1]):
        return rows.weighted_sum(outputs, weights)
    return (outputs.float() * weights.unsqueeze(-1)).sum(dim=1).to(outputs.dtype)
