"""Makes the parts of experts anew from the checkpoint, with scales that suit their inputs.

An expert learns from the rows of the tokens that chose it, and from a few of all tokens: an expert
that hardly any token chose is not fitted to those alone.

D = hidden_size, F = intermediate_size.
"""

from __future__ import annotations

import torch

from mixchat.kernels import rows
from mixchat.weights.make.expert_inputs import ExpertInputs
from mixchat.weights.make.parts import Part
from mixchat.weights.matrix.linear import DenseLinear
from mixchat.weights.source.checkpoint_index import CheckpointIndex, Read

_OF_ALL = 32  # rows of any tokens, beside those of the expert


class Calibrator:
    """Makes parts one after the other: an expert's w2 comes after its w13."""

    def __init__(self, inputs: ExpertInputs, index: CheckpointIndex, read: Read) -> None:
        self._inputs, self._index, self._read = inputs, index, read
        self._w2_inputs = torch.empty(0)

    @torch.inference_mode()
    def make(self, part: Part) -> list[torch.Tensor]:
        """Return the tensors of an expert's part."""
        assert part.linear is not None
        assert part.expert is not None
        weight = part.dense(self._index, self._read)
        if part.linear.name == "w2":
            return part.encoded(weight, self._w2_inputs)
        seen = self._rows(*part.expert)
        self._w2_inputs = rows.swiglu(DenseLinear(weight)(seen))
        return part.encoded(weight, seen)

    def _rows(self, layer: int, expert: int) -> torch.Tensor:
        """Return the rows [n, D] that an expert learns from."""
        every, chosen = self._inputs.of(layer, expert)
        step = max(1, len(every) // _OF_ALL)
        return torch.cat((every[chosen], every[::step][:_OF_ALL]))
