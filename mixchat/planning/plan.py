"""Plans a model on a machine before it is loaded: what fits where, and how fast it will be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from mixchat.base import gpu
from mixchat.experts.cache import ExpertKey
from mixchat.experts.placement import Placement
from mixchat.planning.calibration import Measurement
from mixchat.planning.expectation import Expectation, SpeedRange, expect
from mixchat.planning.fitting import Fit, Tier
from mixchat.planning.hardware import NOTHING_TOLD, Machine, ToldMachine
from mixchat.planning.prompts import FirstToken, first_token, prompt_speed
from mixchat.planning.worker_split import WorkerOffer, WorkerSplit, spread_model

_RAM_STEPS = (8 * 10**9, 16 * 10**9)  # bytes that one might add
_GPU_STEP = 8 * 10**9


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

    told: what is told about the machine, and not measured. device: the one that computes all but
    experts. expected: with as many answers at once as the options of the fit say. prompt: the speed
    of a prompt of `LONG_PROMPT` tokens; both it and first_token are of one answer, and None if the
    disk is needed and could not be measured. spread: one answer at a time with workers, None if
    there are none; all else is without them. in_3_bits: the same with experts in 3 bits; None if
    they cannot be, are not compared or are installed.
    """

    machine: Machine
    device: torch.device
    fit: Fit
    measurement: Measurement
    expected: Expectation
    prompt: SpeedRange | None
    first_token: FirstToken | None
    more: tuple[More, ...]
    spread: WorkerSplit | None = None
    in_3_bits: Form | None = None
    told: ToldMachine = NOTHING_TOLD

    @property
    def gpu_is_assumed(self) -> bool:
        """Return whether the speeds of the GPU are those of a cheap card, for none is here."""
        return bool(self.told.gpus) and not gpu.count()


def _expected(device: torch.device, fit: Fit, measurement: Measurement) -> Expectation:
    return expect(fit.computed, device, measurement, fit.placement, fit.options.parallel)


def plan_form(device: torch.device, fit: Fit, measurement: Measurement) -> Form:
    """Return what a download in this form would give."""
    return Form(fit, _expected(device, fit, measurement))


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
        _expected(device, fit, measurement),
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
        expected = _expected(device, richer, measurement)
        if expected.cost is not None and _counts(richer.placement) not in seen:
            yield More(tier, step, richer, expected)
            seen.add(_counts(richer.placement))


def _counts(placement: Placement) -> tuple[int, ...]:
    return *placement.by_device, placement.host_slots
