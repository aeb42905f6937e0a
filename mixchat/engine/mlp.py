"""The dense part of one layer, which every token goes through.

T = tokens, D = hidden_size.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from mixchat.engine.attention import SingleTokenContext
from mixchat.kernels.cpu import rows
from mixchat.kernels.cpu.program import Stage, alone, together
from mixchat.kernels.cpu.router import Router
from mixchat.weights.format.expert import Expert
from mixchat.weights.matrix.quant_type import RecordingLinear, RecordRows


class DenseMLP:
    """A feed-forward network of an expert's form, whose output may be multiplied by a gate.

    gate: a router to one expert, whose weight multiplies.
    """

    def __init__(self, network: Expert, gate: Router | None = None) -> None:
        self.network, self.gate = network, gate

    def __call__(self, x: torch.Tensor, *, exact: bool = False) -> torch.Tensor:
        """Map x [T, D] to [T, D]."""
        out = self.network(x, exact=exact)
        if self.gate is None:
            return out
        _, weights = self.gate(x)
        return rows.weighted_sum(out.unsqueeze(1), weights)

    def record_inputs(self, of_w13: RecordRows, of_w2: RecordRows) -> None:
        """Record the inputs of both matrices from now on. No step can be made then."""
        up, down = self.network.gate_up, self.network.down
        recording = RecordingLinear(up, of_w13), RecordingLinear(down, of_w2)
        self.network = replace(self.network, gate_up=recording[0], down=recording[1])

    def stages(self, context: SingleTokenContext) -> list[Stage]:
        """Return `__call__` for one token of each sequence, from `normed` to `dense`."""
        rounds, network, gate = self.parts(context)
        return [*rounds, *network, *gate]

    def parts(self, context: SingleTokenContext) -> tuple[list[Stage], list[Stage], list[Stage]]:
        """Return `stages` in three parts, which round the input, compute the network, and gate it.

        The first ones of network and gate do not need each other.
        """
        out = context.dense
        if self.gate is None:
            round_x, *network = self.network.stages(context.normed, out)
            return [round_x], network, []
        ungated = context.tensor("ungated", *out.shape)
        round_x, *network = self.network.stages(context.normed, ungated)
        weight = torch.empty(len(out), 1)
        score, choose = self.gate.steps(
            context.normed, torch.empty(len(out), 1, dtype=torch.int64), weight
        )
        finish = alone(choose, rows.weighted_sum_step(ungated, weight, out))
        return [round_x], network, [together(score), finish]
