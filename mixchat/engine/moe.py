"""The mixture of experts of one layer, a router and a runner of the experts that it selects.

T = tokens, D = hidden_size, E = num_local_experts, K = num_experts_per_tok.
"""

from __future__ import annotations

import torch

from mixchat.engine.attention import SingleTokenContext
from mixchat.experts.cache import ExpertKey
from mixchat.experts.holder import ExpertRunner, LayerExperts
from mixchat.kernels.cpu import rows
from mixchat.kernels.cpu.program import Stage, alone, in_order, together
from mixchat.kernels.cpu.router import Router

Routing = tuple[torch.Tensor, torch.Tensor]  # selected experts [T, K], int64, and weights, fp32


class SparseMoE:
    """Selects K experts for each token, and lets an `ExpertRunner` compute them."""

    def __init__(self, layer: int, router: Router, runner: ExpertRunner) -> None:
        self.layer, self.router, self.runner = layer, router, runner

    def __call__(
        self,
        hidden_states: torch.Tensor,
        *,
        exact: bool = False,
        router_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Map hidden_states [T, D] to [T, D]. The router may have an input of its own."""
        routing = self.router(hidden_states if router_input is None else router_input)
        return self.runner.run(self.layer, hidden_states, *routing, exact=exact)

    @property
    def keys(self) -> list[ExpertKey]:
        return [ExpertKey(self.layer, expert) for expert in range(self.router.gate.shape[0])]

    @property
    def choices(self) -> int:
        """Return K."""
        return self.router.choices

    def router_stages(self, routing: Routing, context: SingleTokenContext) -> list[Stage]:
        """Return the router as stages that fill `routing`, for one token of each sequence."""
        score, choose = self.router.steps(context.normed, *routing)
        return [together(score), *in_order(context.sequences, [choose])]

    def expert_stages(
        self, routing: Routing, context: SingleTokenContext, experts: LayerExperts
    ) -> list[Stage]:
        """Return a runner's work as stages that map `normed` to `added`.

        `experts` are the layer's E.
        """
        selected, weights = routing
        slots = context.slots(experts[0], selected.numel())
        chosen_by = torch.arange(selected.numel()) // self.choices
        arrange = slots.arrange(selected.view(-1), chosen_by, experts.addresses)
        added = rows.weighted_sum_step(slots.outputs, weights, context.added, slots.places)
        return [alone(arrange), *slots.stages, *in_order(context.sequences, [added])]

    def run_routed(self, routing: Routing, context: SingleTokenContext) -> torch.Tensor:
        """Return what the runner adds for `normed`."""
        # Copies, because a runner may hold on to what it is given.
        selected, weights = (tensor.clone() for tensor in routing)
        return self.runner.run(self.layer, context.normed.clone(), selected, weights, exact=True)
