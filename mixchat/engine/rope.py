"""Rotary position embedding (Su et al., arXiv:2104.09864), in Hugging Face's two-halves order.

T = tokens, h = head_dim.
"""

from __future__ import annotations

import torch

from mixchat.kernels import rows
from mixchat.kernels.program import Step


class RotaryEmbedding:
    """Rotates pairs (i, i + h / 2) of a head by the angle position * theta ** (-2i / h)."""

    def __init__(
        self, head_dim: int, theta: float, context: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        frequencies = 1.0 / theta**exponents  # [h / 2]
        angles = torch.outer(torch.arange(context, dtype=torch.float32), frequencies)
        self._cos = torch.cat((angles.cos(), angles.cos()), dim=-1).to(device, dtype)
        # Both are [context, h]. `sin` has the sign, so that a rotation is one roll and no negation.
        self._sin = torch.cat((-angles.sin(), angles.sin()), dim=-1).to(device, dtype)

    def set_position(self, step: Step, position: int) -> None:
        """Let a step of `rows.rotate_step` rotate one token, which is at `position`."""
        step.set(cos=self._cos[position].data_ptr(), sin=self._sin[position].data_ptr())

    def __call__(self, x: torch.Tensor, positions: slice | torch.Tensor) -> torch.Tensor:
        """Rotate x [T, heads, h], whose tokens are at these T positions."""
        return rows.rotate(x, self._cos[positions], self._sin[positions])
