"""Records what experts are given while a model computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from mixchat.experts.holder import ExpertRunner
    from mixchat.experts.keys import ExpertKey
    from mixchat.weights.format.blueprint import Expert

    # Takes a layer, its rows [T, D], and the experts [T, K] selected for them.
    Record = Callable[[int, torch.Tensor, torch.Tensor], object]


class RecordingRunner:
    """An `ExpertRunner` that lets another one compute, and records what that was given."""

    def __init__(self, runner: ExpertRunner, record: Record) -> None:
        self._runner, self._record = runner, record

    def run(
        self,
        layer: int,
        hidden_states: torch.Tensor,
        selected_experts: torch.Tensor,
        routing_weights: torch.Tensor,
        *,
        exact: bool = False,
    ) -> torch.Tensor:
        """Run the experts, then record: a layer that Ctrl-C ends is not recorded."""
        result = self._runner.run(
            layer, hidden_states, selected_experts, routing_weights, exact=exact
        )
        self._record(layer, hidden_states, selected_experts)
        return result

    def resident(self, layers: Sequence[Sequence[ExpertKey]]) -> Sequence[Sequence[Expert]]:
        """Return none: what is computed without `run` is not recorded."""
        return ()

    def note_hits(self, keys: Sequence[ExpertKey]) -> None:
        """Do nothing: there are no hits without experts from `resident`."""
