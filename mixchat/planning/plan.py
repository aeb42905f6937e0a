"""Plans a model on a machine before it is loaded, and predicts its speed once it is.

Known models and fewer bits are planned by arithmetic, from the figures of the measured model.

Speeds are None if the disk is needed and was not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mixchat.base.errors import ResourceError, UsageError
from mixchat.base.options import LoadOptions
from mixchat.experts.memory import CPU
from mixchat.experts.placement import Placement
from mixchat.planning.expectation import (
    Expectation,
    FirstToken,
    SpeedRange,
    expect,
    expect_fit,
    first_token,
    prompt_speed,
)
from mixchat.planning.faster_device import fit_on_faster
from mixchat.planning.fitting import FreeMemory, MemoryPlan, fit_model
from mixchat.planning.gpu_speeds import GPUSpeeds, Origin
from mixchat.planning.hardware import NOTHING_TOLD, Machine, ToldMachine
from mixchat.planning.machine_speeds import LAYER_START_S, Measurement
from mixchat.planning.measuring import saved_measurement
from mixchat.weights.format.blueprint import Blueprint
from mixchat.weights.matrix.quant_type import QuantType


@dataclass(frozen=True)
class Size:
    """The same model with experts of these `bits`, as `--expert-bits` takes them."""

    bits: str
    fit: MemoryPlan
    expected: Expectation


@dataclass(frozen=True)
class KnownFit:
    """A known model in the free memory, with the names that it has.

    bytes: of the installed model. `problem` says why it has no `fit`. `device` computes it.
    """

    names: tuple[str, ...]
    bytes: int
    device: torch.device
    fit: MemoryPlan | None = None
    expected: Expectation | None = None
    problem: str | None = None


@dataclass(frozen=True)
class MachinePlan:
    """A model on a machine, with its placement and its speed. Workers do not count.

    `prompt` and both first tokens are of one answer. The cold one has nothing in memory, and the
    warm one the model with the experts that fit.
    """

    machine: Machine
    device: torch.device  # computes all but experts
    fit: MemoryPlan
    measurement: Measurement
    expected: Expectation  # with as many answers at once as the options of `fit` say
    prompt: SpeedRange | None  # of `LONG_PROMPT` tokens
    cold: FirstToken | None
    warm: FirstToken | None
    starting: float = 0.0  # seconds until Python and its libraries run
    sizes: tuple[Size, ...] = ()  # the planned one and smaller ones, if there is a choice
    told: ToldMachine = NOTHING_TOLD  # about the machine, and not measured
    known: tuple[KnownFit, ...] = ()  # other models, if they were asked for
    reason: str | None = None  # why not all GPUs compute, as a sentence

    @property
    def gpus(self) -> tuple[GPUSpeeds, ...]:
        """Return the figures of the GPUs that compute, none for a CPU."""
        return self.measurement.typical.gpus if self.device != CPU else ()

    @property
    def types_on_gpu(self) -> dict[QuantType, tuple[float, Origin]]:
        """Return the part of the first GPU's bandwidth for each type, and its origin."""
        first, model = self.gpus[0], self.fit.blueprint
        matrices = [*model.typical_matrices, *([model.head] if model.head else [])]
        return {
            matrix.quant_type: (
                first.part_for(matrix),
                "measured" if matrix.quant_type in first.efficiency else "assumed",
            )
            for matrix in matrices
        }


def plan_model(
    machine: Machine, device: torch.device, fit: MemoryPlan, measurement: Measurement
) -> MachinePlan:
    """Return the plan for a model that fits on a machine that was measured."""
    return MachinePlan(
        machine,
        device,
        fit,
        measurement,
        expect_fit(fit, device, measurement),
        prompt_speed(fit.blueprint, device, measurement, fit.placement),
        first_token(fit.blueprint, device, measurement, None),
        first_token(fit.blueprint, device, measurement, fit.placement),
    )


def fit_known(
    known: Mapping[tuple[str, ...], Blueprint],
    free: FreeMemory,
    device: torch.device,
    options: LoadOptions,
    measured: Callable[[Blueprint], Measurement],
    *,
    chooses: bool = False,
) -> Iterator[KnownFit]:
    """Yield the models by their size, with the measurement that `measured` has for each.

    If it `chooses`, a model that the GPUs cannot hold, or that is slower on them, gets the CPU.
    """
    for names, blueprint in sorted(known.items(), key=lambda item: item[1].weights_size):
        size, measurement, on_cpu = blueprint.weights_size, measured(blueprint), None
        try:
            if chooses:
                fit, on_cpu = fit_on_faster(blueprint, free, options, measurement)
            else:
                fit = fit_model(blueprint, free, options)
        except ResourceError:
            yield KnownFit(names, size, device, problem="does not fit into memory")
        except UsageError:
            yield KnownFit(names, size, device, problem="does not run with these flags")
        else:
            computing = device if on_cpu is None else CPU
            expected = expect_fit(fit, computing, measurement)
            yield KnownFit(names, size, computing, fit, expected)


def scaled(measurement: Measurement, measured: Blueprint, blueprint: Blueprint) -> Measurement:
    """Return the measurement of one model's shape on a CPU, scaled to the sizes of another.

    An expert takes bytes / bandwidth, and a layer that plus a constant.
    """
    expert_ratio = blueprint.mean_expert / measured.mean_expert
    layer_ratio = blueprint.mean_layer / measured.mean_layer
    samples = []
    for sample in measurement.samples:
        seconds = {rows: expert_ratio * s for rows, s in sample.expert_seconds.items()}
        constant = min(LAYER_START_S, sample.layer_seconds)
        layer_seconds = constant + layer_ratio * (sample.layer_seconds - constant)
        samples.append(replace(sample, expert_seconds=seconds, layer_seconds=layer_seconds))
    return replace(measurement, samples=tuple(samples))


@dataclass(frozen=True)
class Prediction:
    """The speed of a loaded model, with the experts in its slots by now."""

    blueprint: Blueprint
    device: torch.device
    measurement: Measurement
    placement: Placement

    def decode(self) -> SpeedRange | None:
        return expect(self.blueprint, self.device, self.measurement, self.placement).speed

    def prompt(self, tokens: int, *, cold: bool) -> SpeedRange | None:
        """Return the speed of a prompt. If it is `cold`, all experts come from disk."""
        placement = None if cold else self.placement
        return prompt_speed(self.blueprint, self.device, self.measurement, placement, tokens)


def predict_speed(
    blueprint: Blueprint, directory: Path, device: torch.device, placement: Placement
) -> Prediction | None:
    """Return the prediction for a loaded model, None without a saved measurement."""
    saved = saved_measurement(blueprint, directory, device)
    return None if saved is None else Prediction(blueprint, device, saved, placement)
