"""Records what experts are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from mixchat.experts.cache import ExpertKey
    from mixchat.experts.holder import ExpertRunner, LayerExperts

    # Takes a layer, its rows [T, D], and the experts [T, K] selected for them.
    Record = Callable[[int, torch.Tensor, torch.Tensor], object]


class RecordingRunner:
    """Lets another `ExpertRunner` compute, and records its input."""

    def __init__(self, runner: ExpertRunner, record: Record) -> None:
        self._runner = runner
        self._record = record

    def run(
        self,
        layer: int,
        hidden_states: torch.Tensor,
        selected_experts: torch.Tensor,
        routing_weights: torch.Tensor,
        *,
        exact: bool = False,
    ) -> torch.Tensor:
        result = self._runner.run(
            layer, hidden_states, selected_experts, routing_weights, exact=exact
        )
        self._record(layer, hidden_states, selected_experts)
        return result

    def resident(self, layers: Sequence[Sequence[ExpertKey]]) -> Sequence[LayerExperts]:
        """Return none, because only `run` records."""
        return ()

    def note_hits(self, layer: int, selected: Sequence[Sequence[int]]) -> None:
        """Do nothing, because `resident` returns none."""
