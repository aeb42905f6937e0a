"""Records the inputs of experts while a model computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from mixchat.experts.holder import ExpertRunner


class Recorder(Protocol):
    """Takes the rows [T, D] of a layer and the experts [T, K] chosen for them."""

    def add(
        self, layer: int, hidden_states: torch.Tensor, selected_experts: torch.Tensor
    ) -> None: ...


class RecordingRunner:
    """An `ExpertRunner` that gives the inputs to a recorder, and lets another one compute."""

    def __init__(self, runner: ExpertRunner, recorder: Recorder) -> None:
        self._runner, self._recorder = runner, recorder

    def run(
        self,
        layer: int,
        hidden_states: torch.Tensor,
        selected_experts: torch.Tensor,
        routing_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Record, and run the experts."""
        self._recorder.add(layer, hidden_states, selected_experts)
        return self._runner.run(layer, hidden_states, selected_experts, routing_weights)
