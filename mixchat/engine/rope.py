"""Rotary position embedding (Su et al., arXiv:2104.09864), in Hugging Face's two-halves order."""

from __future__ import annotations

import torch

from mixchat.kernels import rows


class RotaryEmbedding:
    """Rotates pairs (i, i + head_dim / 2) of a head by position * theta ** (-2i / head_dim)."""

    def __init__(
        self, head_dim: int, theta: float, context: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        frequencies = 1.0 / theta**exponents  # [head_dim / 2]
        angles = torch.outer(torch.arange(context, dtype=torch.float32), frequencies)
        self._cos = torch.cat((angles.cos(), angles.cos()), dim=-1).to(device, dtype)
        # The sign belongs to `sin`, so that a rotation is one roll and no negation.
        self._sin = torch.cat((-angles.sin(), angles.sin()), dim=-1).to(device, dtype)

    def __call__(self, x: torch.Tensor, start: int) -> torch.Tensor:
        """Rotate x [T, heads, head_dim], whose first token is at position `start`."""
        end, half = start + x.shape[0], x.shape[-1] // 2
        cos, sin = self._cos[start:end], self._sin[start:end]  # [T, head_dim]
        if rows.computes(x, half):
            return rows.rotate(x, cos, sin)
        return x * cos[:, None] + x.roll(half, dims=-1) * sin[:, None]
