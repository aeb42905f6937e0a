"""Measures the figures of this machine's GPUs."""

from __future__ import annotations

from dataclasses import replace
from statistics import median

import torch

from mixchat.base import gpu
from mixchat.planning.bandwidth import MemoryMeter, ProductMeter, bus_bandwidth, room_on, seconds_of
from mixchat.planning.compute_speed import FilledTensors
from mixchat.planning.gpu_speeds import GPUSpeeds
from mixchat.weights.format.blueprint import Blueprint
from mixchat.weights.matrix.linear import LinearSpec

# Of one product. A product of an expert of 2.5 MB takes 3 us, and its launch without a graph 20. So
# the columns are the model's, and the rows as many as the GPU works on for longer.
_MATRIX_BYTES = 2**27
_BAND = 64  # rows that any type interleaves
_CALLS = 4  # at once, so that the wait for the GPU counts little


@torch.inference_mode()
def measure_gpu(blueprint: Blueprint, device: torch.device) -> GPUSpeeds:
    """Measure a GPU with the types of a model's matrices.

    Types whose product does not fit together with a loaded model keep their assumed efficiency.
    """
    memory = MemoryMeter(device).rate()
    bus, compute = bus_bandwidth(device), ProductMeter(device).rate()
    matrices = [*blueprint.typical_matrices, *([blueprint.head] if blueprint.head else [])]
    efficiency: dict[str, float] = {}
    for matrix in {matrix.quant_type: matrix for matrix in matrices}.values():
        try:
            efficiency[matrix.quant_type] = min(_reading_rate(matrix, device) / memory, 1.0)
        except torch.OutOfMemoryError:
            continue
    gpu.release_unused(device)  # or it would count as taken
    return GPUSpeeds(gpu.name(device), memory, bus, compute, efficiency)


def _reading_rate(matrix: LinearSpec, device: torch.device) -> float:
    """Return the bytes a second of products of one row with a matrix of this type."""
    per_band = _BAND * matrix.nbytes // matrix.rows
    bands = max(room_on(device, _MATRIX_BYTES) // per_band, 1)
    tall = replace(matrix, rows=_BAND * bands, bias=False)
    linear = FilledTensors(device).linear(tall)
    x = torch.ones(1, tall.columns, dtype=tall.dtype, device=device)

    def run() -> None:
        for _ in range(_CALLS):
            linear(x)

    return _CALLS * tall.nbytes / median(seconds_of(run, device))
