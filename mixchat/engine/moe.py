"""The router: which experts see which token, and with what weight."""

from __future__ import annotations

import torch
from torch.nn import functional

from mixchat.experts.runner import ExpertRunner
from mixchat.kernels import router


class SparseMoE:
    """One layer's router over an `ExpertRunner`, which knows where the experts are.

    T = tokens, D = hidden_size, E = num_local_experts, K = num_experts_per_tok.
    """

    def __init__(
        self, layer: int, gate: torch.Tensor, experts_per_token: int, runner: ExpertRunner
    ) -> None:
        self._layer, self._experts_per_token, self._runner = layer, experts_per_token, runner
        self._gate = gate.float().contiguous()  # [E, D]

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        selected_experts, routing_weights = self.route(hidden_states)
        return self._runner.run(self._layer, hidden_states, selected_experts, routing_weights)

    def route(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The K best experts of each token [T, K], and the softmax over their logits [T, K].

        All in fp32: rounding the logits could change which expert comes second.
        """
        if router.computes(hidden_states, self._gate):
            return router.route(hidden_states, self._gate, self._experts_per_token)
        router_logits = functional.linear(hidden_states.float(), self._gate)  # [T, E]
        kept, selected_experts = router_logits.topk(self._experts_per_token, dim=-1)
        return selected_experts, kept.softmax(dim=-1)
