"""Computes the experts that a layer's router selected, bringing them into the cache as needed.

T = tokens, D = hidden_size, K = num_experts_per_tok.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from mixchat import gpu, interrupts
from mixchat.experts.fetcher import MISSING, Fetcher
from mixchat.experts.host_compute import HostCompute
from mixchat.experts.keys import ExpertKey
from mixchat.experts.prefetch import Prefetch, ranked_keys
from mixchat.experts.stats import ExpertStats
from mixchat.kernels import rows

AHEAD = 2  # experts on their way while one is computed


class CachedExperts:
    """An `ExpertHolder`: runs experts out of slots that a `Fetcher` fills; two slots are enough.

    Every expert is used once a call, with all of its tokens. Those in their slots come first:
    otherwise a prefill that walks through more experts than there are slots would evict each just
    before its turn. While one is computed, the next ones are on their way, and after them those
    that `prefetch` predicts. The order does not change the result, because the K outputs of a token
    are stored apart until all are there, and then summed in the order of its choices.
    """

    def __init__(
        self, fetcher: Fetcher, prefetch: Prefetch | None = None, host: HostCompute | None = None
    ) -> None:
        self._fetcher, self._prefetch, self._host = fetcher, prefetch, host

    @property
    def stats(self) -> ExpertStats:
        return self._fetcher.stats

    @property
    def slots(self) -> int:
        return self._fetcher.slots

    @property
    def slots_by_tier(self) -> dict[str, int]:
        return self._fetcher.slots_by_tier

    @property
    def bytes_held(self) -> int:
        return self._fetcher.bytes_held

    def tier(self, key: ExpertKey) -> str:
        return self._fetcher.tier(key)

    def halve(self) -> bool:
        return self._fetcher.halve()

    def run(
        self,
        layer: int,
        hidden_states: torch.Tensor,
        selected_experts: torch.Tensor,
        routing_weights: torch.Tensor,
    ) -> torch.Tensor:
        tokens, choices = selected_experts.shape
        outputs = hidden_states.new_empty(tokens * choices, hidden_states.shape[-1])  # [T * K, D]
        selected, predicted, token = self._read(layer, hidden_states, selected_experts)
        places = _places(layer, selected)
        self._fetcher.settle(layer, places)
        on_host = self._chosen_for_host(places)
        by_state = sorted(places, key=self._fetcher.state)
        # What the CPU computes comes second: a GPU then has its own work meanwhile.
        order = sorted(
            by_state, key=lambda key: key not in on_host and not self._fetcher.holds(key)
        )
        indices = _indices(places, selected_experts) if tokens > 1 else {}
        for turn, key in enumerate(order):
            interrupts.check()
            self._request([other for other in order[turn:] if other not in on_host])
            if turn == 0:
                self._look_ahead(layer, hidden_states, predicted, order)
            if tokens == 1:  # decode: nothing to gather
                outputs[places[key][0]] = self._output(key, hidden_states, key in on_host, token)[0]
                continue
            x = hidden_states[indices[key] // choices]
            outputs[indices[key]] = self._output(key, x, key in on_host)
        return rows.weighted_sum(outputs.view(tokens, choices, -1), routing_weights)

    def _read(
        self, layer: int, hidden_states: torch.Tensor, selected_experts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Return the selected experts, the predicted ones and the hidden states, on the CPU.

        A GPU that decodes is waited for here, and nowhere else in a layer: what may be needed of it
        is read together. Else the last two are None, and read later: the next experts are then on
        their way first.
        """
        decodes = hidden_states.shape[0] == 1 and gpu.is_gpu(hidden_states.device)
        if self._prefetch is None or self._fetcher.holds_all or not decodes:
            return gpu.read([selected_experts])[0], None, None
        predicted = self._prefetch.predict(layer, hidden_states)
        x = hidden_states if self._host is not None else hidden_states[:0]
        selected, predicted, x = gpu.read([selected_experts, predicted, x])
        return selected, predicted, x

    def _chosen_for_host(self, places: Mapping[ExpertKey, Sequence[int]]) -> set[ExpertKey]:
        """Return the experts without a slot that the CPU computes, though the rest is on a GPU."""
        if self._host is None:
            return set()
        missing = {
            key: len(at) for key, at in places.items() if self._fetcher.state(key) == MISSING
        }
        return set(self._host.choose(missing))

    def _request(self, keys: Sequence[ExpertKey]) -> None:
        ahead = min(AHEAD, self._fetcher.slots - 1)
        self._fetcher.request(keys[: 1 + ahead])

    def _look_ahead(
        self,
        layer: int,
        hidden_states: torch.Tensor,
        predicted: torch.Tensor | None,
        pinned: Sequence[ExpertKey],
    ) -> None:
        if self._prefetch is None or self._fetcher.holds_all:
            return
        if predicted is None:
            (predicted,) = gpu.read([self._prefetch.predict(layer, hidden_states)])
        self._fetcher.prefetch(ranked_keys(layer, predicted), pinned)

    def _output(
        self, key: ExpertKey, x: torch.Tensor, on_host: bool, copy: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return an expert's output for x [n, D], of which `copy` is on the CPU."""
        if on_host and self._host is not None:
            result = self._host.run(key, x.cpu() if copy is None else copy)
            if result is not None:
                self._fetcher.stats.misses[key] += 1
                return result.to(x.device, non_blocking=True)
            self._request([key])
        return self._fetcher.ready(key)(x)


def _places(layer: int, selected: torch.Tensor) -> dict[ExpertKey, list[int]]:
    """Return each selected expert with its places in the flattened `selected`, on the CPU."""
    places: dict[ExpertKey, list[int]] = {}
    for place, expert in enumerate(selected.flatten().tolist()):
        places.setdefault(ExpertKey(layer, expert), []).append(place)
    return places


def _indices(
    places: Mapping[ExpertKey, Sequence[int]], selected: torch.Tensor
) -> dict[ExpertKey, torch.Tensor]:
    """Return the same as tensors [n] on the device of `selected`, which is not waited for."""
    keys = sorted(places)
    counts = [len(places[key]) for key in keys]
    by_expert = torch.split(selected.flatten().argsort(stable=True), counts)
    return dict(zip(keys, by_expert, strict=True))
