"""Plans a model on a machine before it is loaded, and predicts its speed once it is.

Known models and fewer bits are planned by arithmetic, from the figures of the measured model.

Speeds are None if the disk is needed and was not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mixchat.base import gpu
from mixchat.base.errors import ResourceError, UsageError
from mixchat.base.options import LoadOptions
from mixchat.experts.cache import ExpertKey
from mixchat.experts.memory import CPU
from mixchat.experts.placement import Placement
from mixchat.planning.expectation import Expectation, SpeedRange, expect
from mixchat.planning.fitting import FreeMemory, MemoryPlan, Tier, fit_model
from mixchat.planning.hardware import NOTHING_TOLD, Machine, ToldMachine
from mixchat.planning.machine_speeds import MachineSpeeds, Measurement
from mixchat.planning.measuring import saved_measurement
from mixchat.planning.prompts import FirstToken, first_token, prompt_speed
from mixchat.planning.worker_split import WorkerOffer, WorkerSplit, spread_model
from mixchat.weights.format.blueprint import Blueprint

_RAM_STEPS = (8 * 10**9, 16 * 10**9)  # bytes that a person might add
_GPU_STEP = 8 * 10**9
_STARTING = 5e-5  # seconds to start the kernels of an expert on a GPU
# Seconds of a layer on a CPU that its size does not change. Granite's took 0.13 ms longer than
# reading its bytes.
_LAYER_STARTING = 1e-4


@dataclass(frozen=True)
class Upgrade:
    """A machine with `bytes` more of a tier, and the model there."""

    tier: Tier
    bytes: int
    fit: MemoryPlan
    expected: Expectation


@dataclass(frozen=True)
class Size:
    """The same model with experts of these `bits`, as `--expert-bits` takes them."""

    bits: str
    fit: MemoryPlan
    expected: Expectation


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


@dataclass(frozen=True)
class MachinePlan:
    """A model on a machine, with its places, its speed, and what more memory would give.

    `prompt` and `first_token` are of one answer. Only `spread` counts workers.
    """

    machine: Machine
    device: torch.device  # computes all but experts
    fit: MemoryPlan
    measurement: Measurement
    expected: Expectation  # with as many answers at once as the options of `fit` say
    prompt: SpeedRange | None  # of `LONG_PROMPT` tokens
    first_token: FirstToken | None
    more: tuple[Upgrade, ...]
    spread: WorkerSplit | None = None  # one answer at a time with workers
    sizes: tuple[Size, ...] = ()  # the planned one and smaller ones, if there is a choice
    told: ToldMachine = NOTHING_TOLD  # about the machine, and not measured
    known: tuple[KnownFit, ...] = ()  # other models, if they were asked for

    @property
    def gpu_is_assumed(self) -> bool:
        """Return whether the GPU counts as a cheap card, because none is here."""
        return bool(self.told.gpus) and not gpu.count()


def expect_fit(device: torch.device, fit: MemoryPlan, measurement: Measurement) -> Expectation:
    """Return the speed of decoding with the places and the answers at once of a fit."""
    return expect(fit.computed, device, measurement, fit.placement, fit.options.parallel)


def plan_model(
    there: Machine,
    device: torch.device,
    fit: MemoryPlan,
    measurement: Measurement,
    offers: Sequence[WorkerOffer] = (),
    uses: Mapping[ExpertKey, int] | None = None,
) -> MachinePlan:
    """Return the plan for a model that fits on a machine that was measured.

    `uses` counts uses of experts.
    """
    computed, placement = fit.computed, fit.placement
    return MachinePlan(
        there,
        device,
        fit,
        measurement,
        expect_fit(device, fit, measurement),
        prompt_speed(computed, device, measurement, placement),
        first_token(fit.blueprint, device, measurement),
        tuple(_upgrades(device, fit, measurement)),
        spread_model(computed, device, measurement, placement, offers, uses) if offers else None,
    )


def _upgrades(device: torch.device, fit: MemoryPlan, measurement: Measurement) -> Iterator[Upgrade]:
    """Yield the steps of memory that hold more experts."""
    steps: list[tuple[Tier, int]] = [("host", step) for step in _RAM_STEPS]
    if fit.free.device is not None:
        steps.append(("device", _GPU_STEP))
    seen = {_counts(fit.placement)}
    for tier, step in steps:
        richer = fit.with_more(tier, step)
        expected = expect_fit(device, richer, measurement)
        if expected.cost is not None and _counts(richer.placement) not in seen:
            yield Upgrade(tier, step, richer, expected)
            seen.add(_counts(richer.placement))


def _counts(placement: Placement) -> tuple[int, ...]:
    return *placement.by_device, placement.host_slots


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
            yield KnownFit(names, size, fit, expect_fit(device, fit, measured(fit)))


def scaled(measurement: Measurement, measured: Blueprint, blueprint: Blueprint) -> Measurement:
    """Return a measurement for one model as one for another, whose parts have other sizes.

    The CPU takes as long as it takes to read a part, and the same time for every layer besides.
    GPUs also start kernels, which takes as long for every model.
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
    constant = sample.layer_seconds if on_gpu else min(_LAYER_STARTING, sample.layer_seconds)
    layer_seconds = constant + layers * (sample.layer_seconds - constant)
    return replace(sample, expert_seconds=seconds, layer_seconds=layer_seconds)


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
