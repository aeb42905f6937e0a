"""Compares a machine's GPUs with its CPU alone, for one model."""

from __future__ import annotations

import torch

from mixchat.base import gpu
from mixchat.base.errors import ResourceError
from mixchat.base.options import LoadOptions
from mixchat.base.quantities import format_size
from mixchat.experts.memory import CPU
from mixchat.planning.expectation import expect_fit
from mixchat.planning.fitting import FreeMemory, MemoryPlan, fit_model
from mixchat.planning.machine_speeds import Measurement
from mixchat.weights.format.blueprint import Blueprint

_LEAST_GAIN = 1.1  # of the CPU, because predictions are not better than that


def fit_on_faster(
    blueprint: Blueprint, free: FreeMemory, options: LoadOptions, measurement: Measurement
) -> tuple[MemoryPlan, str | None]:
    """Return the places of a model on the GPUs, or on the CPU if that decodes faster.

    Also return why it is not the GPUs, as the end of a sentence. Without memory for the model on
    the GPUs it is the CPU, too. Raises `ResourceError` if the model fits on neither.
    """
    on_cpu = None
    try:
        on_cpu = fit_model(blueprint, free.without_gpus(), options)
        on_gpu = fit_model(blueprint, free, options)
    except ResourceError:
        if on_cpu is None:
            return fit_model(blueprint, free, options), None
        return on_cpu, f"too little memory ({format_size(free.device or 0)} are free)"
    device = torch.device(gpu.KIND, 0)
    gpu_speed = expect_fit(on_gpu, device, measurement).tokens_per_second
    cpu_speed = expect_fit(on_cpu, CPU, measurement).tokens_per_second
    if gpu_speed is None or cpu_speed is None or cpu_speed < _LEAST_GAIN * gpu_speed:
        return on_gpu, None
    return on_cpu, f"slower by the plan ({gpu_speed:.2g} tok/s, the CPU {cpu_speed:.2g})"
