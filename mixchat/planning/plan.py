"""Plans a model on a machine before it is loaded, and predicts its speed once it is.

Known models and fewer bits are planned by arithmetic, from the figures of the measured model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mixchat.base import gpu
from mixchat.base.errors import ResourceError, UsageError
from mixchat.base.options import LoadOptions
from mixchat.base.quantities import format_size
from mixchat.experts.memory import CPU
from mixchat.experts.placement import Placement
from mixchat.install.known_models import KNOWN
from mixchat.planning.expectation import READING, SpeedEstimate
from mixchat.planning.fitting import FreeMemory, MemoryPlan, fit_model
from mixchat.planning.hardware import Machine, ToldMachine
from mixchat.planning.machine_speeds import LAYER_START_S, MachineSpeeds
from mixchat.planning.measuring import saved_speeds
from mixchat.weights.format.blueprint import Blueprint

_LEAST_GAIN = 1.1  # how much faster the CPU has to be, because estimates err by as much

Names = tuple[str, ...]  # of a known model


@dataclass(frozen=True)
class ModelPlan:
    """The places of a model in memory, and its speed. Workers do not count."""

    fit: MemoryPlan
    speed: SpeedEstimate

    @property
    def is_resident(self) -> bool:
        """Return whether memory holds all experts, so that no token waits for the disk."""
        return self.fit.placement.held >= self.fit.placement.experts

    @classmethod
    def of(cls, fit: MemoryPlan, device: torch.device, speeds: MachineSpeeds) -> ModelPlan:
        """Return the plan of a model that `device` computes."""
        answers = fit.options.parallel
        estimate = SpeedEstimate(fit.blueprint, device, speeds, fit.placement, answers)
        return cls(fit, replace(estimate, kv_bits=fit.options.kv_bits))

    @property
    def at_full_context(self) -> float | None:
        """Return the tokens a second of each answer after as many tokens as the context holds."""
        return replace(self.speed, context=self.fit.context).tokens_per_second


@dataclass(frozen=True)
class MachinePlan:
    """A model on a machine, beside the same model in fewer bits and other models."""

    machine: Machine
    told: ToldMachine  # figures of the machine that were told, not measured
    model: ModelPlan
    sizes: Mapping[str, ModelPlan]  # by bits, if there is a choice
    catalog: Mapping[Names, Blueprint]
    known: Mapping[Names, ModelPlan | str]  # plans of the catalog, or why there is none
    reason: str | None = None  # why not all GPUs compute, as a sentence
    recommended: Names | None = None  # of the catalog, whose plan `model` is

    @property
    def slower_sizes(self) -> list[str]:
        """Return the bits that decode more slowly than 4 on GPUs that hold all experts in 4.

        Codes of fewer bits take more instructions, for which many a GPU has no time.
        """
        placement = self.model.fit.placement
        rate = self.model.speed.tokens_per_second
        if not rate or self.model.speed.device == CPU:
            return []
        if sum(placement.by_device) < placement.experts:
            return []
        rates = {bits: plan.speed.tokens_per_second for bits, plan in self.sizes.items()}
        return [bits for bits, fewer in rates.items() if fewer and fewer < rate]

    @property
    def offered_sizes(self) -> Mapping[str, ModelPlan]:
        """Return the sizes without those that are slower, none if there is no choice."""
        slower = self.slower_sizes
        sizes = {bits: plan for bits, plan in self.sizes.items() if bits not in slower}
        return sizes if len(sizes) > 1 else {}


def fit_on_faster(
    blueprint: Blueprint, free: FreeMemory, options: LoadOptions, speeds: MachineSpeeds
) -> tuple[ModelPlan, str | None]:
    """Return the plan of a model on the GPUs, or on the CPU if that decodes faster.

    Also return why the CPU computes, as the end of a sentence. The CPU computes, too, if the model
    does not fit on the GPUs. Raises `ResourceError` if the model fits on neither.
    """
    device = torch.device(gpu.KIND, 0)
    on_cpu = None
    try:
        on_cpu = ModelPlan.of(fit_model(blueprint, free.without_gpus(), options), CPU, speeds)
        on_gpu = ModelPlan.of(fit_model(blueprint, free, options), device, speeds)
    except ResourceError:
        if on_cpu is None:
            return ModelPlan.of(fit_model(blueprint, free, options), device, speeds), None
        return on_cpu, f"too little memory ({format_size(free.device or 0)} are free)"
    gpu_speed = on_gpu.speed.tokens_per_second
    cpu_speed = on_cpu.speed.tokens_per_second
    if gpu_speed is None or cpu_speed is None or cpu_speed < _LEAST_GAIN * gpu_speed:
        return on_gpu, None
    return on_cpu, f"slower by the plan ({gpu_speed:.2g} tok/s, the CPU {cpu_speed:.2g})"


def plan_known(
    catalog: Mapping[Names, Blueprint],
    free: FreeMemory,
    device: torch.device,
    options: LoadOptions,
    speeds_of: Callable[[Blueprint], MachineSpeeds],
    *,
    chooses: bool = False,
) -> Iterator[tuple[Names, ModelPlan | str]]:
    """Yield the names of each model with its plan, or why there is none.

    If it `chooses`, a model that the GPUs cannot hold, or that is slower on them, gets the CPU.
    """
    for names, blueprint in catalog.items():
        speeds = speeds_of(blueprint)
        try:
            if chooses:
                yield names, fit_on_faster(blueprint, free, options, speeds)[0]
            else:
                yield names, ModelPlan.of(fit_model(blueprint, free, options), device, speeds)
        except ResourceError:
            yield names, "does not fit into memory"
        except UsageError:
            yield names, "does not run with these flags"


def recommended(
    known: Mapping[Names, ModelPlan | str], has_room: Callable[[Names], bool]
) -> Names | None:
    """Return the names of the best model for a machine, None if no model fits.

    The best one has the highest published score of those that are held in memory as a whole, and
    decode faster than a person reads. Models without a score come after those, by size. If there
    is no such model, the fastest one is the best. `has_room` tells if the disk takes a download.
    """
    plans = {names: plan for names, plan in known.items() if not isinstance(plan, str)}
    plans = {names: plan for names, plan in plans.items() if has_room(names)} or plans
    rates = {names: plan.speed.tokens_per_second or 0.0 for names, plan in plans.items()}
    good = [names for names, plan in plans.items() if plan.is_resident and rates[names] >= READING]
    if not good:
        return max(rates, key=rates.__getitem__, default=None)

    def quality(names: Names) -> tuple[float, int]:
        score = KNOWN[names[0]].score
        return score.percent if score else 0.0, plans[names].fit.blueprint.weights_size

    return max(good, key=quality)


def scaled(speeds: MachineSpeeds, measured: Blueprint, blueprint: Blueprint) -> MachineSpeeds:
    """Return the speeds for one model's shape on a CPU, scaled to the sizes of another.

    An expert takes its bytes / bandwidth. A layer takes that and a constant.
    """
    expert_ratio = blueprint.mean_expert / measured.mean_expert
    layer_ratio = blueprint.mean_layer / measured.mean_layer
    constant = min(LAYER_START_S, speeds.layer_seconds)
    return replace(
        speeds,
        expert_seconds={rows: expert_ratio * s for rows, s in speeds.expert_seconds.items()},
        layer_seconds=constant + layer_ratio * (speeds.layer_seconds - constant),
    )


def predict_speed(
    blueprint: Blueprint, directory: Path, device: torch.device, placement: Placement
) -> SpeedEstimate | None:
    """Return the speed of a loaded model, None if this machine was not measured for it."""
    saved = saved_speeds(blueprint, directory, device)
    return None if saved is None else SpeedEstimate(blueprint, device, saved, placement)
