"""Computes the experts that a layer's router chose, bringing them into the cache as needed.

T = tokens, D = hidden_size, I = intermediate_size, K = num_experts_per_tok.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn import functional

from mixchat.experts.cache import ExpertKey, LRUCache
from mixchat.experts.stats import ExpertStats
from mixchat.experts.store import ExpertStore
from mixchat.weights.blueprint import Expert


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
    """Runs experts out of an LRU cache over a store; two slots are enough.

    Every expert is touched once a call, with all of its tokens. Those in the cache go first: else a
    prefill that walks through more experts than there are slots would evict each just before its
    turn. The order does not show in the result, because the K outputs of a token are kept apart
    until all are there, and then summed in the order of its choices.
    """

    def __init__(self, cache: LRUCache, store: ExpertStore) -> None:
        self._cache, self._store = cache, store
        self.stats = ExpertStats(slots=store.slots)

    def run(
        self,
        layer: int,
        hidden_states: torch.Tensor,
        selected_experts: torch.Tensor,
        routing_weights: torch.Tensor,
    ) -> torch.Tensor:
        tokens, choices = selected_experts.shape
        outputs = hidden_states.new_empty(tokens * choices, hidden_states.shape[-1])
        for expert, places in self._hits_first(layer, selected_experts):
            module = self._fetch(ExpertKey(layer, expert))
            if tokens == 1:  # decode: nothing to gather
                outputs[places[0]] = compute(module, hidden_states)[0]
                continue
            index = torch.tensor(places, device=outputs.device)  # [n], into T * K
            outputs[index] = compute(module, hidden_states[index // choices])
        weighted = outputs.view(tokens, choices, -1).float() * routing_weights.unsqueeze(-1)
        return weighted.sum(dim=1).to(hidden_states.dtype)

    def _hits_first(self, layer: int, selected: torch.Tensor) -> list[tuple[int, list[int]]]:
        """Each chosen expert with the places, in the flattened `selected`, that chose it."""
        groups: dict[int, list[int]] = {}
        for place, expert in enumerate(selected.flatten().tolist()):
            groups.setdefault(expert, []).append(place)
        return sorted(
            groups.items(), key=lambda group: ExpertKey(layer, group[0]) not in self._cache
        )

    def _fetch(self, key: ExpertKey) -> Expert:
        slot = self._cache.lookup(key)
        if slot is not None:
            self.stats.hits += 1
            return self._store.expert(slot)
        self.stats.misses += 1
        try:
            slot = self._cache.admit(key)
            self.stats.bytes_moved += self._store.load(key, slot)
        except BaseException:
            # Also for Ctrl-C: a slot with half an expert must not be found later.
            if key in self._cache:
                self._cache.discard(key)
            raise
        return self._store.expert(slot)


def compute(expert: Expert, x: torch.Tensor) -> torch.Tensor:
    """w2(silu(w1 x) * w3 x) for x [n, D]."""
    gate, up = expert.w13(x).chunk(2, dim=-1)  # [n, I] each
    return expert.w2(functional.silu(gate) * up)
