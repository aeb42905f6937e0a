"""Predicts the known models on a machine that was measured for one model, by arithmetic alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from mixchat.base.errors import ResourceError, UsageError
from mixchat.base.options import LoadOptions
from mixchat.experts.memory import CPU
from mixchat.planning.expectation import Expectation, expect
from mixchat.planning.fitting import FreeMemory, MemoryPlan, fit_model
from mixchat.planning.machine_speeds import MachineSpeeds, Measurement
from mixchat.weights.format.blueprint import Blueprint

_STARTING = 5e-5  # seconds to start the kernels of an expert on a GPU


@dataclass(frozen=True)
class KnownFit:
    """A known model in the free memory, with the names that it has.

    bytes: of the installed model. `problem` says why it has no `fit`.
    """

    names: tuple[str, ...]
    bytes: int
    fit: MemoryPlan | None = None
    expected: Expectation | None = None
    problem: str | None = None


def fit_known(
    known: Mapping[tuple[str, ...], Blueprint],
    free: FreeMemory,
    device: torch.device,
    options: LoadOptions,
    measured: Callable[[MemoryPlan], Measurement],
) -> Iterator[KnownFit]:
    """Yield the models by their size, with the measurement that `measured` has for each."""
    for names, blueprint in sorted(known.items(), key=lambda item: item[1].weights_size):
        size = blueprint.weights_size
        try:
            fit = fit_model(blueprint, free, options)
        except ResourceError:
            yield KnownFit(names, size, problem="does not fit into memory")
        except UsageError:
            yield KnownFit(names, size, problem="does not run with these flags")
        else:
            measurement, answers = measured(fit), options.parallel
            expected = expect(fit.computed, device, measurement, fit.placement, answers)
            yield KnownFit(names, size, fit, expected)


def scaled(measurement: Measurement, measured: Blueprint, blueprint: Blueprint) -> Measurement:
    """Return a measurement for one model as one for another, whose parts have other sizes.

    The CPU takes as long as it takes to read a part. GPUs also start kernels, which takes as long
    for every model.
    """
    experts = blueprint.mean_expert / measured.mean_expert
    layers = blueprint.attention_size / measured.attention_size
    samples = tuple(_scaled(sample, experts, layers) for sample in measurement.samples)
    return replace(measurement, samples=samples)


def _scaled(sample: MachineSpeeds, experts: float, layers: float) -> MachineSpeeds:
    on_gpu = len(sample.expert_seconds) > 1
    seconds = {
        device: {
            rows: max(experts * seconds, 0.0 if device == str(CPU) else _STARTING)
            for rows, seconds in by_rows.items()
        }
        for device, by_rows in sample.expert_seconds.items()
    }
    layer_seconds = sample.layer_seconds * (1.0 if on_gpu else layers)
    return replace(sample, expert_seconds=seconds, layer_seconds=layer_seconds)
