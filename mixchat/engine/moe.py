"""The mixture of experts of one layer: a router, and whatever runs the experts that it selects.

T = tokens, D = hidden_size, E = num_local_experts, K = num_experts_per_tok.
"""

from __future__ import annotations

import torch

from mixchat.experts.holder import ExpertRunner
from mixchat.kernels import router


class SparseMoE:
    """Selects K experts for each token, and lets an `ExpertRunner` compute them."""

    def __init__(
        self, layer: int, gate: torch.Tensor, experts_per_token: int, runner: ExpertRunner
    ) -> None:
        self._layer, self._experts_per_token, self.runner = layer, experts_per_token, runner
        self.gate = gate.float().contiguous()  # [E, D]

    def __call__(self, hidden_states: torch.Tensor, *, exact: bool = False) -> torch.Tensor:
        """Map hidden_states [T, D] to [T, D]."""
        selected_experts, routing_weights = router.route(  # [T, K], [T, K]
            hidden_states, self.gate, self._experts_per_token
        )
        return self.runner.run(
            self._layer, hidden_states, selected_experts, routing_weights, exact=exact
        )
