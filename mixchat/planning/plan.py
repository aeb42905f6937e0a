"""Plans a model on a machine before it is loaded: what fits where, and how fast it will be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mixchat import gpu, machine
from mixchat.experts.keys import ExpertKey
from mixchat.experts.placement import Placement
from mixchat.planning.calibration import Measurement
from mixchat.planning.expectation import Expectation, SpeedRange, expect
from mixchat.planning.fitting import Fit, FreeMemory, Tier
from mixchat.planning.prompts import FirstToken, first_token, prompt_speed
from mixchat.planning.spread import Spread, WorkerOffer, spread_model

_RAM_STEPS = (8 * 10**9, 16 * 10**9)  # bytes that one might add
_GPU_STEP = 8 * 10**9


@dataclass(frozen=True)
class OtherGPU:
    """A GPU beside the first one: torch's name for the device, its name for people, its bytes."""

    device: str
    name: str
    memory: int


@dataclass(frozen=True)
class Machine:
    """The hardware, in bytes; `gpu` and `gpu_memory` are None where the CPU computes."""

    cpu: str
    cores: int
    memory: int
    free: FreeMemory
    disk_free: int
    gpu: str | None = None
    gpu_memory: int | None = None
    other_gpus: tuple[OtherGPU, ...] = ()

    @classmethod
    def now(cls, directory: Path, devices: Sequence[torch.device]) -> Machine:
        """Return this machine, with the disk of `directory`, which need not be there yet."""
        device, *others = devices
        return cls(
            cpu=machine.cpu_name(),
            cores=machine.usable_cores(),
            memory=machine.total_memory(),
            free=FreeMemory.now(devices),
            disk_free=machine.free_disk(directory),
            gpu=gpu.name(device) if gpu.is_gpu(device) else None,
            gpu_memory=gpu.total_memory(device) if gpu.is_gpu(device) else None,
            other_gpus=tuple(
                OtherGPU(str(other), gpu.name(other), gpu.total_memory(other)) for other in others
            ),
        )


@dataclass(frozen=True)
class More:
    """A machine with `bytes` more of a tier: where the model goes then, and how fast it is."""

    tier: Tier
    bytes: int
    fit: Fit
    expected: Expectation


@dataclass(frozen=True)
class Form:
    """The same model with experts of another type: where it goes then, and how fast it is."""

    fit: Fit
    expected: Expectation


@dataclass(frozen=True)
class MachinePlan:
    """A model on a machine: where it goes, how fast it will be, and what more memory would give.

    device: the one that computes all but experts. prompt: the speed of a prompt of `LONG_PROMPT`
    tokens; both it and first_token are None where the disk is needed and could not be measured.
    spread: the same with workers, None where there are none; all else is without them.
    in_3_bits: the same with experts in 3 bits; None where they cannot be, or are installed.
    """

    machine: Machine
    device: torch.device
    fit: Fit
    measurement: Measurement
    expected: Expectation
    prompt: SpeedRange | None
    first_token: FirstToken | None
    more: tuple[More, ...]
    spread: Spread | None = None
    in_3_bits: Form | None = None


def plan_form(device: torch.device, fit: Fit, measurement: Measurement) -> Form:
    """Return what a download in this form would give."""
    return Form(fit, expect(fit.computed, device, measurement, fit.placement))


def plan_model(
    there: Machine,
    device: torch.device,
    fit: Fit,
    measurement: Measurement,
    offers: Sequence[WorkerOffer] = (),
    uses: Mapping[ExpertKey, int] | None = None,
) -> MachinePlan:
    """Return the plan for a model that fits on a machine that was measured.

    offers: those of workers; uses: how often each expert was used, if that is known.
    """
    computed, placement = fit.computed, fit.placement
    return MachinePlan(
        there,
        device,
        fit,
        measurement,
        expect(computed, device, measurement, placement),
        prompt_speed(computed, device, measurement, placement),
        first_token(fit.blueprint, device, measurement),
        tuple(_more(device, fit, measurement)),
        spread_model(computed, device, measurement, placement, offers, uses) if offers else None,
    )


def _more(device: torch.device, fit: Fit, measurement: Measurement) -> Iterator[More]:
    """Yield the steps of memory that hold more experts than the ones before."""
    steps: list[tuple[Tier, int]] = [("host", step) for step in _RAM_STEPS]
    if fit.free.device is not None:
        steps.append(("device", _GPU_STEP))
    seen = {_counts(fit.placement)}
    for tier, step in steps:
        richer = fit.with_more(tier, step)
        expected = expect(richer.computed, device, measurement, richer.placement)
        if expected.cost is not None and _counts(richer.placement) not in seen:
            yield More(tier, step, richer, expected)
            seen.add(_counts(richer.placement))


def _counts(placement: Placement) -> tuple[int, ...]:
    return *placement.by_device, placement.host_slots
