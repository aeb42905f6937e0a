"""Plans a model on this machine, or on one that a person describes."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from mixchat.base import gpu
from mixchat.base.errors import ResourceError, UsageError
from mixchat.base.machine import OtherPrograms
from mixchat.base.options import ExpertSize, LoadOptions
from mixchat.base.progress import Reporter
from mixchat.base.quantities import format_age
from mixchat.base.settings import models_dir
from mixchat.experts.memory import CPU
from mixchat.install.known_models import KNOWN
from mixchat.install.make.download_plan import ShardBytes
from mixchat.install.make.outline import Outline, known_blueprints
from mixchat.install.make.quantize_options import DEMO_LOSS
from mixchat.install.models import find_installed
from mixchat.kernels.cpu.compile import require_kernels
from mixchat.loading.devices import is_free_to_choose, note_excess, on_cpu_because, usable_devices
from mixchat.planning.fitting import expected_mix, fit_model, has_bits
from mixchat.planning.hardware import Machine, ToldMachine
from mixchat.planning.machine_speeds import BUSY, MachineSpeeds
from mixchat.planning.measuring import estimated_speeds, measure_machine, saved_speeds
from mixchat.planning.plan import (
    MachinePlan,
    ModelPlan,
    Names,
    fit_on_faster,
    plan_known,
    recommended,
    scaled,
)
from mixchat.planning.torch_threads import choose_threads
from mixchat.weights.format.blueprint import Blueprint
from mixchat.weights.format.manifest import is_installed

# Bytes a second that a laptop's CPU reads from RAM. A quick measurement at a busy moment would
# recommend a smaller model.
_USUAL_MEMORY = 15e9


def plan(
    outline: Outline,
    options: LoadOptions,
    reporter: Reporter,
    *,
    told: ToldMachine,
    programs: OtherPrograms,
    again: bool = False,
    catalog: Mapping[Names, Blueprint],
) -> MachinePlan:
    """Return the plan for a model, and measure the machine if that is needed, or `again`.

    `told` has the figures of another machine. `programs` tells how busy this one is. All speeds
    come from one measurement. The speeds of the models of `catalog`, by their names, and of experts
    in fewer bits follow from it by arithmetic. With a catalog, the plan is that of its recommended
    model, and `outline` is only measured.
    Raises `MixchatError` if the model does not fit, an option cannot be used, or the CPU is too
    old.
    """
    require_kernels()
    choice = usable_devices(options.device)
    blueprint = outline.blueprint
    reason = choice.reason
    device = told.device(choice.devices[0])
    machine = told.machine(Machine.now(outline.directory, choice.devices))
    note_excess(options, machine.memory, reporter.note)
    free = machine.free
    chooses = bool(machine.gpus) and is_free_to_choose(options)
    try:  # a model that does not fit is refused before anything is measured
        fit_model(blueprint, free, options)
    except ResourceError:
        if not chooses:
            raise
        fit_model(blueprint, free.without_gpus(), options)
    choose_threads(blueprint)
    measured = _speeds(outline, choice.devices[0], reporter, programs, again=again)

    def speeds_of(model: Blueprint) -> MachineSpeeds:
        # Two measurements would compare the machine's load at two times, and not the models. On a
        # busy machine 4 bits had 1.6 to 7 tok/s, and 3 bits, measured later, had 8 to 9.6.
        return told.speeds(scaled(measured, blueprint, model))

    known = dict(plan_known(catalog, free, device, options, speeds_of, chooses=chooses))
    disk_free = math.inf if told.is_another and told.free_disk is None else machine.disk_free
    names = recommended(known, lambda names: _has_room(names, catalog[names], disk_free))
    planned = blueprint if names is None else catalog[names]
    speeds = speeds_of(planned)
    if chooses:
        model, why = fit_on_faster(planned, free, options, speeds)
        if why is not None:
            reason = on_cpu_because(machine.gpus[0].name, why)
            device = CPU
            machine = machine.without_gpus()
    else:
        model = ModelPlan.of(fit_model(planned, free, options), device, speeds)
    sizes = {"4": model}
    if not catalog and not outline.installed and "--expert-bits" not in outline.arguments:
        for bits in tuple(DEMO_LOSS)[1:]:
            with suppress(ResourceError, UsageError):  # too large, or keeps its published bits
                smaller = expected_mix(blueprint, ExpertSize.parse(bits))
                fit = fit_model(smaller, machine.free, options)
                sizes[bits] = ModelPlan.of(fit, device, speeds_of(smaller))
    if len(sizes) == 1:
        sizes = {}
    return MachinePlan(machine, told, model, sizes, catalog, known, reason, names)


def recommend() -> tuple[str, ModelPlan] | None:
    """Return the name of the known model that is recommended for this machine, and its plan.

    Nothing is measured, so the speeds are a usual machine's. Return None if no model fits.
    """
    devices = usable_devices(None).devices
    gpus = [device for device in devices if gpu.is_gpu(device)]
    catalog = known_blueprints()
    machine = Machine.now(models_dir(), devices)
    known = dict(
        plan_known(
            catalog,
            machine.free,
            devices[0],
            LoadOptions(),
            lambda blueprint: estimated_speeds(blueprint, gpus, _USUAL_MEMORY),
            chooses=bool(gpus),
        )
    )
    names = recommended(known, lambda names: _has_room(names, catalog[names], machine.disk_free))
    if names is None:
        return None
    plan = known[names]
    assert isinstance(plan, ModelPlan)
    return names[0], plan


def _has_room(names: Names, blueprint: Blueprint, free: float) -> bool:
    """Return whether a known model is installed, or `free` bytes of disk take its download."""
    if find_installed(names[0]) is not None:
        return True
    shards = ShardBytes.foreseen(KNOWN[names[0]].fetched_bytes, blueprint.weights_size)
    return shards.peak(ahead=False) <= free


def in_mix(outline: Outline, bits: ExpertSize) -> Outline:
    """Return the outline of the model with experts of other bits.

    An installed model with these bits is returned as it is. Raises `UsageError`.
    """
    if outline.installed and has_bits(outline.blueprint, bits):
        return outline
    arguments = (*(outline.arguments or (outline.name,)), "--expert-bits", str(bits))
    blueprint = expected_mix(outline.blueprint, bits)
    return replace(outline, blueprint=blueprint, installed=False, arguments=arguments)


def _speeds(
    outline: Outline,
    device: torch.device,
    reporter: Reporter,
    programs: OtherPrograms,
    *,
    again: bool,
) -> MachineSpeeds:
    """Return the saved speeds for a model, or measure this machine if they are outdated."""
    blueprint = outline.blueprint
    saved = None if again else saved_speeds(blueprint, outline.directory, device)
    if saved is not None:
        reason = saved.outdated(time.time())
        if outline.installed and not is_installed(Path(saved.directory)):
            # A virtual machine's host returns bytes that were just written several times as fast.
            reason = "the last time a file just written was read, not the model"
        if reason is None:
            return saved
        if programs.share() > BUSY:
            age = format_age(time.time() - saved.measured_at)
            reporter.note(f"this machine is busy, so the speeds measured {age} are used")
            return saved
        reporter.note(f"measuring this machine again: {reason}")
    with reporter.status("measuring this machine (20 s at most)"):
        return measure_machine(blueprint, outline.directory, device)
