"""Rotary position embedding, and the ways to stretch it over longer contexts.

The frequencies of each type are computed in the order of transformers' modeling_rope_utils.py,
which makes them equal to the bit. h = head_dim, or the columns of a head that are rotated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from mixchat.base.model_config import ModelConfig
from mixchat.base.rope_parameters import RopeParameters
from mixchat.kernels.cpu import rows
from mixchat.kernels.cpu.program import Step


class RotaryEmbedding:
    """Rotates pairs (i, i + h / 2) of a head by the angle position * frequencies[i].

    Su et al., arXiv:2104.09864, in Hugging Face's two-halves order. If a head has more columns than
    these, the others stay unchanged. Types that stretch by the length of a sequence ("dynamic",
    "longrope") always stretch for a sequence that fills the context. Logits then differ from
    transformers' for shorter sequences, if the context is longer than the original one, which is
    the default.
    """

    # A stretch that followed the length would make the keys in a cache wrong, and the answer would
    # depend on how its prompt was read.

    def __init__(
        self,
        parameters: RopeParameters,
        head_dim: int,
        context: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.width = head_dim = parameters.rotated(head_dim)
        frequencies = _frequencies(parameters, head_dim, context)  # [h / 2]
        # In fp32: bf16 has 8 bits, and could not tell position 1000 from 1001.
        angles = torch.outer(torch.arange(context, dtype=torch.float32), frequencies)
        factor = _attention_factor(parameters)
        cos = angles.cos() * factor
        sin = angles.sin() * factor
        self._cos = torch.cat((cos, cos), dim=-1).to(device, dtype)  # [context, h]
        # `sin` has the sign, so that a rotation needs no negation.
        self._sin = torch.cat((-sin, sin), dim=-1).to(device, dtype)
        self.query_scales: torch.Tensor | None = None  # fp32 [context]
        if beta := parameters.llama_4_scaling_beta:
            contexts = torch.arange(context) // parameters.original_max_position_embeddings
            self.query_scales = (1 + beta * torch.log1p(contexts.float())).to(device)

    def __call__(self, x: torch.Tensor, positions: slice | torch.Tensor) -> torch.Tensor:
        """Rotate x [T, heads, head_dim], whose tokens are at these T positions."""
        return rows.rotate(x, self._cos[positions], self._sin[positions])

    @property
    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin [context, h]. The first half of sin is negative."""
        return self._cos, self._sin

    def set_positions(self, step: Step, positions: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """Let a step of `rows.rotate_step` rotate tokens at these positions.

        Return the tensors that it points to.
        """
        tables = self.tables
        offset = 0
        if len(positions) == 1:
            # A row's address, since torch takes some 40 us to make a view.
            offset = positions[0] * tables[0].stride(0) * tables[0].element_size()
        else:
            tables = self._cos[list(positions)], self._sin[list(positions)]
        step.set(cos=tables[0].data_ptr() + offset, sin=tables[1].data_ptr() + offset)
        return tables


def rotary_embeddings(
    config: ModelConfig, context: int, dtype: torch.dtype, device: torch.device
) -> list[RotaryEmbedding | None]:
    """Return each layer's rotary embedding, which layers with the same parameters share.

    Layers whose mixer does not rotate have none.
    """
    shared = {
        (parameters, columns): RotaryEmbedding(parameters, columns, context, dtype, device)
        for parameters, columns in config.rotations
    }
    layers = range(config.num_hidden_layers)
    return [shared.get((config.rope(n), config.rotating_columns(n))) for n in layers]


def _powers(theta: float | torch.Tensor, head_dim: int) -> torch.Tensor:
    """Return theta ** (2i / h) for each pair i [h / 2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return torch.as_tensor(theta**exponents)


def _frequencies(rope: RopeParameters, head_dim: int, context: int) -> torch.Tensor:
    """Return the angle between two positions for each pair [h / 2], by the type of the rope."""
    length = rope.stretched_for(context)
    powers = _powers(rope.rope_theta, head_dim)
    match rope.rope_type:
        case "linear":
            return 1.0 / powers / rope.factor
        case "dynamic" if length is not None:
            # A larger theta, by how much the context exceeds the original one. A tensor, because
            # transformers rounds these steps to fp32.
            tokens = torch.tensor(length)
            original = rope.original_max_position_embeddings
            ratio = (rope.factor * tokens / original) - (rope.factor - 1)
            theta = rope.rope_theta * ratio ** (head_dim / (head_dim - 2))
            return 1.0 / _powers(theta, head_dim)
        case "longrope":
            # Each frequency is divided by a number of its own. Ding et al., arXiv:2402.13753.
            factors = torch.tensor(rope.short_factor if length is None else rope.long_factor)
            return 1.0 / (factors * powers)
        case "yarn":
            return _yarn(rope, powers, head_dim)
        case "llama3":
            # High frequencies stay, low ones are divided, and those between are a mix of both.
            low = rope.low_freq_factor
            high = rope.high_freq_factor
            frequencies = 1.0 / powers
            original = rope.original_max_position_embeddings
            lengths = 2 * math.pi / frequencies  # of one rotation, in tokens
            kept = (original / lengths - low) / (high - low)
            mixed = (1 - kept) * frequencies / rope.factor + kept * frequencies
            stretched = torch.where(lengths < original / high, frequencies, mixed)
            return torch.where(lengths > original / low, frequencies / rope.factor, stretched)
        case "proportional":
            turning = torch.arange(head_dim // 2) < int(rope.partial_rotary_factor * head_dim // 2)
            return torch.where(turning, 1.0 / powers, 0.0) / rope.factor
        case "nope":
            return torch.zeros(head_dim // 2)
        case _:  # "default", and "dynamic" within the original context
            return 1.0 / powers


def _yarn(rope: RopeParameters, powers: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Keep high frequencies, divide low ones by `factor`, and change over between them.

    Peng et al., arXiv:2309.00071.
    """

    def pair_with(rotations: float) -> float:
        """Return the pair that turns `rotations` times over the original context."""
        turns = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return (head_dim * math.log(turns)) / (2 * math.log(rope.rope_theta))

    low = pair_with(rope.beta_fast)
    high = pair_with(rope.beta_slow)
    if rope.truncate:
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, head_dim - 1)
    if low == high:
        high += 0.001
    pairs = torch.arange(head_dim // 2, dtype=torch.float32)
    kept = 1 - torch.clamp((pairs - low) / (high - low), 0, 1)
    return 1.0 / (rope.factor * powers) * (1 - kept) + 1.0 / powers * kept


def _attention_factor(rope: RopeParameters) -> float:
    """Return the number that cos and sin are multiplied by."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.rope_type == "longrope" and rope.factor > 1:
        original = rope.original_max_position_embeddings
        return math.sqrt(1 + math.log(rope.factor) / math.log(original))
    if rope.rope_type != "yarn":
        return 1.0
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor)


def _mscale(factor: float, mscale: float = 1) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
