"""The block of an expert as kernels for GPUs read it. It imports Triton."""

from __future__ import annotations

from typing import NamedTuple

import torch

from mixchat.kernels.gpu.experts import ExpertForm, ExpertMatrix, Levels
from mixchat.weights.format.expert import ExpertSpec
from mixchat.weights.matrix.gpu_linear import form_of, levels_on
from mixchat.weights.matrix.linear import LinearSpec


class GpuExpertForm(NamedTuple):
    """The form of an expert's block, and the levels of its matrices on a GPU."""

    form: ExpertForm
    levels: Levels

    def sums(self, choices: int) -> int:
        """Return the rows of partial sums of so many experts."""
        return choices * self.form.split(choices).count


def expert_form(spec: ExpertSpec, device: torch.device) -> GpuExpertForm:
    """Return the form of an expert's block. `form.is_supported` tells whether kernels take it."""
    down_at = spec.gate_up.nbytes
    swiglu = spec.swiglu
    parts = (_part(spec.gate_up, 0), _part(spec.down, down_at))
    form = ExpertForm(*parts, swiglu.limit, swiglu.alpha, swiglu.act)
    matrices = spec.gate_up, spec.down
    return GpuExpertForm(
        form, Levels(*(levels_on(matrix.quant_type, device) for matrix in matrices))
    )


def _part(spec: LinearSpec, start: int) -> ExpertMatrix:
    """Return the offsets of the tensors of a matrix, which begins at byte `start` of the block."""
    places = []
    for tensor in spec.tensors:
        places.append(start)
        start += tensor.nbytes
    bias_at = places.pop() if spec.bias else None
    # A dense matrix has no absmax. Its offset is not read.
    return ExpertMatrix(form_of(spec), codes_at=places[-1], absmax_at=places[0], bias_at=bias_at)
