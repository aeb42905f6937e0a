"""The short gated convolution of one layer, which remembers the last inputs of each channel.

T = tokens of this call, D = hidden_size.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from mixchat.engine.attention import SingleTokenContext
from mixchat.engine.model_tensors import ModelTensors
from mixchat.engine.rope import RotaryEmbedding
from mixchat.engine.sequence_cache import TokenContext
from mixchat.engine.state_cache import StateCache
from mixchat.kernels.cpu import rows
from mixchat.kernels.cpu.convolution import Convolution
from mixchat.kernels.cpu.program import Stage, Step, alone, together
from mixchat.weights.format.blueprint import Blueprint
from mixchat.weights.matrix.linear import as_packed
from mixchat.weights.matrix.quant_type import Linear, RecordingLinear, RecordRows


class ShortConv:
    """A gate of the inputs, a convolution, and a gate of the outputs.

    in_proj: to both gates and the inputs.
    """

    def __init__(
        self, layer: int, in_proj: Linear, out_proj: Linear, convolution: Convolution
    ) -> None:
        self._layer, self.convolution = layer, convolution
        self.in_proj, self.out_proj = in_proj, out_proj

    @classmethod
    def build(
        cls, layer: int, used: Blueprint, tensors: ModelTensors, rope: RotaryEmbedding | None
    ) -> ShortConv:
        spec = used.mixer(layer)
        in_proj, out_proj = map(tensors.linear, spec.matrices.values())
        weight = tensors.tensor(spec.tensors["conv"])
        return cls(layer, in_proj, out_proj, Convolution(weight, gated=True))

    def record_inputs(self, records: Mapping[str, RecordRows]) -> None:
        self.in_proj = RecordingLinear(self.in_proj, records["in_proj"])
        self.out_proj = RecordingLinear(self.out_proj, records["out_proj"])

    def has_stages(self, dtype: torch.dtype) -> bool:
        return rows.can_compute(dtype, self.convolution.channels)

    def __call__(
        self, x: torch.Tensor, context: TokenContext, *, exact: bool = False
    ) -> torch.Tensor:
        """Map x [T, D] to [T, D]."""
        projected, out = self.in_proj(x, exact=exact), []  # [T, 3D]
        for rows_of, cache in context.pieces(self._layer):
            assert isinstance(cache, StateCache)
            sequence = projected[rows_of]
            for segment, before, after in cache.segments(sequence.shape[0]):
                out.append(self.convolution(sequence[segment], before["conv"], after["conv"]))
        convolved = out[0] if len(out) == 1 else torch.cat(out)
        return self.out_proj(convolved, exact=exact)

    def stages(self, context: SingleTokenContext) -> list[Stage]:
        channels, tokens = self.convolution.channels, context.sequences
        projected = context.tensor("projected", tokens, 3 * channels)
        convolved = context.tensor("convolved", tokens, channels)
        round_x, project = as_packed(self.in_proj).steps(context.normed, projected)
        convolves = [
            self.convolution.step(row, out)
            for row, out in zip(torch.split(projected, 1), torch.split(convolved, 1), strict=True)
        ]
        round_out, project_out = as_packed(self.out_proj).steps(convolved, context.added)
        context.bind(self._layer, *(partial(_set_place, convolve) for convolve in convolves))
        return [
            alone(round_x),
            together(project),
            alone(*convolves, round_out),
            together(project_out),
        ]


def _set_place(convolve: Step, cache: StateCache) -> None:
    for _, before, after in cache.segments(1):
        convolve.set(before=before["conv"].data_ptr(), after=after["conv"].data_ptr())
