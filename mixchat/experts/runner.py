"""Computes the experts that a layer's router chose, bringing them into the cache as needed.

T = tokens, D = hidden_size, I = intermediate_size, K = num_experts_per_tok.
"""

from __future__ import annotations

import time
from typing import Protocol

import torch
from torch.nn import functional

from mixchat.experts.cache import ExpertKey, LRUCache
from mixchat.experts.mover import Mover, Transfer
from mixchat.experts.stats import ExpertStats
from mixchat.experts.store import ExpertStore
from mixchat.weights.blueprint import Expert

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
    """Runs experts out of an LRU cache over a store; two slots are enough.

    Every expert is touched once a call, with all of its tokens. Those in the cache go first: else a
    prefill that walks through more experts than there are slots would evict each just before its
    turn. While one is computed, the next ones are on their way. The order does not show in the
    result, because the K outputs of a token are kept apart until all are there, and then summed in
    the order of its choices.
    """

    def __init__(self, cache: LRUCache, store: ExpertStore) -> None:
        self._cache, self._store = cache, store
        self._mover = Mover(store.load)
        # What is in the cache, but perhaps not in its slot yet.
        self._coming: dict[ExpertKey, Transfer] = {}
        self._ahead = min(AHEAD, store.slots - 1)
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
        groups = self._hits_first(layer, selected_experts)
        for turn, (key, places) in enumerate(groups):
            self._begin([other for other, _ in groups[turn : turn + 1 + self._ahead]])
            module = self._ready(key)
            if tokens == 1:  # decode: nothing to gather
                outputs[places[0]] = compute(module, hidden_states)[0]
                continue
            index = torch.tensor(places, device=outputs.device)  # [n], into T * K
            outputs[index] = compute(module, hidden_states[index // choices])
        self.stats.bytes_moved = self._store.bytes_moved
        weighted = outputs.view(tokens, choices, -1).float() * routing_weights.unsqueeze(-1)
        return weighted.sum(dim=1).to(hidden_states.dtype)

    def _hits_first(self, layer: int, selected: torch.Tensor) -> list[tuple[ExpertKey, list[int]]]:
        """Each chosen expert with the places, in the flattened `selected`, that chose it."""
        groups: dict[ExpertKey, list[int]] = {}
        for place, expert in enumerate(selected.flatten().tolist()):
            groups.setdefault(ExpertKey(layer, expert), []).append(place)
        return sorted(groups.items(), key=lambda group: group[0] not in self._cache)

    def _begin(self, window: list[ExpertKey]) -> None:
        """See to it that these are in the cache or on their way, as far as there are slots."""
        for key in window:
            if key in self._cache:
                if key not in self._coming or not self._coming[key].failed:
                    continue
                self._cache.discard(key)  # an earlier call ended before it heard of the failure
            # First of all: whoever finds the key in the cache has to know that its bytes may not be
            # there, also after a Ctrl-C between any two of these lines.
            transfer = self._coming[key] = Transfer(key)
            slot = self._cache.admit(key, pinned=window)
            self._forget_evicted()
            if slot is None:
                return
            self.stats.misses += 1
            self._mover.begin(transfer, slot)

    def _forget_evicted(self) -> None:
        for key in [key for key in self._coming if key not in self._cache]:
            self._coming.pop(key).cancelled = True

    def _ready(self, key: ExpertKey) -> Expert:
        """The expert, once it is in its slot."""
        slot = self._cache.lookup(key)
        assert slot is not None, key
        transfer = self._coming.get(key)
        if transfer is None:
            self.stats.hits += 1
            return self._store.expert(slot)
        if not transfer.queued:
            self._mover.begin(transfer, slot)
        began = time.perf_counter()
        try:
            transfer.wait()
        except BaseException:
            if transfer.ended:  # it failed; if not, this is Ctrl-C, and it is still on its way
                self._cache.discard(key)
                del self._coming[key]
            raise
        self.stats.stalled_seconds += time.perf_counter() - began
        del self._coming[key]
        return self._store.expert(slot)


def compute(expert: Expert, x: torch.Tensor) -> torch.Tensor:
    """w2(silu(w1 x) * w3 x) for x [n, D]."""
    gate, up = expert.w13(x).chunk(2, dim=-1)  # [n, I] each
    return expert.w2(functional.silu(gate) * up)
