"""The block of an expert as kernels for GPUs read it. It imports Triton."""

from __future__ import annotations

import torch

from mixchat.kernels.gpu.experts import ExpertForm, Levels, Part
from mixchat.weights.format.expert import ExpertSpec
from mixchat.weights.matrix.gpu_linear import form_of, levels_on
from mixchat.weights.matrix.linear import LinearSpec


def expert_form(spec: ExpertSpec) -> ExpertForm:
    """Return the form of an expert's block. `ExpertForm.is_supported` tells if kernels take it."""
    down_at = sum(tensor.nbytes for tensor in spec.gate_up.tensors)
    gate_up, down = _part(spec.gate_up, 0), _part(spec.down, down_at)
    return ExpertForm(gate_up, down, spec.swiglu.limit, spec.swiglu.alpha)


def levels_of(spec: ExpertSpec, device: torch.device) -> Levels:
    """Return the levels of both matrices."""
    matrices = spec.gate_up, spec.down
    return Levels(*(levels_on(matrix.quant_type, device) for matrix in matrices))


def _part(spec: LinearSpec, start: int) -> Part:
    """Return where the tensors of a matrix lie that begins at byte `start`."""
    places = []
    for tensor in spec.tensors:
        places.append(start)
        start += tensor.nbytes
    bias_at = places.pop() if spec.bias else None
    # A dense matrix has no absmax, which nothing reads then.
    return Part(form_of(spec), codes_at=places[-1], absmax_at=places[0], bias_at=bias_at)
