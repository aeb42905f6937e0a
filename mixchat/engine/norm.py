"""The RMSNorm of hidden states, and of a layer's queries and keys.

T = tokens of this call, D = hidden_size, h = head_dim.
"""

from __future__ import annotations

import torch

from mixchat.kernels.cpu import rows
from mixchat.kernels.cpu.program import Stage, Step, in_order


class RMSNorm:
    """x / rms(x) times the weight. A weight in fp32 multiplies before the quotient is rounded."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self.weight, self.eps = weight, eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [T, D] to [T, D]."""
        return rows.rms_norm(x, self.weight, self.eps)

    def stage(self, x: torch.Tensor, out: torch.Tensor) -> Stage:
        """Return `__call__` as a stage, from x [T, D] to `out` [T, D]."""
        (stage,) = in_order(x.shape[0], [rows.rms_norm_step(x, self.weight, self.eps, out)])
        return stage

    def normalize_heads(self, x: torch.Tensor) -> None:
        """Normalize heads [T, heads, h] in place.

        A weight [h] takes each head alone, and a weight [heads * h] takes all heads together.
        """
        parts = self._parts(x)
        rows.rms_norm(parts, self.weight, self.eps, out=parts)

    def heads_step(self, x: torch.Tensor, out: torch.Tensor | None = None) -> Step:
        """Return `normalize_heads` as a step. It writes to `out` if that is given."""
        parts = self._parts(x)
        target = parts if out is None else self._parts(out)
        return rows.rms_norm_step(parts, self.weight, self.eps, target)

    def _parts(self, x: torch.Tensor) -> torch.Tensor:
        return x.view(x.shape[0], -1, self.weight.shape[0])
