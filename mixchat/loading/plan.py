"""Plans a model on this machine, or on one that a person describes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from mixchat.base.errors import ResourceError, UsageError
from mixchat.base.machine import OtherPrograms
from mixchat.base.options import ExpertSize, LoadOptions
from mixchat.base.progress import Reporter
from mixchat.base.quantities import format_age
from mixchat.experts.memory import CPU
from mixchat.install.make.outline import Outline
from mixchat.install.make.quantize_options import DEMO_LOSS
from mixchat.kernels.cpu.compile import require_kernels
from mixchat.loading.devices import is_free_to_choose, on_cpu_because, usable_devices
from mixchat.planning.expectation import expect_fit
from mixchat.planning.faster_device import fit_on_faster
from mixchat.planning.fitting import FreeMemory, MemoryPlan, expected_mix, fit_model, has_bits
from mixchat.planning.hardware import Machine, ToldMachine
from mixchat.planning.machine_speeds import BUSY, Measurement
from mixchat.planning.measuring import measure_machine, saved_measurement
from mixchat.planning.plan import MachinePlan, Size, fit_known, plan_model, scaled
from mixchat.planning.torch_threads import choose_threads
from mixchat.weights.format.blueprint import Blueprint
from mixchat.weights.format.manifest import is_installed


def plan(
    outline: Outline,
    options: LoadOptions,
    reporter: Reporter,
    *,
    told: ToldMachine,
    programs: OtherPrograms,
    again: bool = False,
    catalog: Mapping[tuple[str, ...], Blueprint] | None = None,
    starting: float = 0.0,
) -> MachinePlan:
    """Return the plan for a model, and measure the machine if that is needed, or `again`.

    `told` has the figures of another machine. `programs` tells how busy this one is. All speeds
    come from one measurement. The speeds of the models of `catalog`, by their names, and of experts
    in fewer bits follow from it by arithmetic. `starting` is the seconds until Python and its
    libraries run.
    Raises `MixchatError` if the model does not fit, an option cannot be used, or the CPU is too
    old.
    """
    require_kernels()
    choice, blueprint = usable_devices(options.device), outline.blueprint
    devices, reason = choice.devices, choice.reason
    here, device = devices[0], told.device(devices[0])
    machine = told.machine(Machine.now(outline.directory, devices))
    chooses = machine.gpu is not None and is_free_to_choose(options)
    fit = _first_fit(blueprint, machine.free, options, chooses=chooses)
    choose_threads(blueprint)
    known = _measurement(outline, blueprint, here, reporter, programs, again=again)
    measurement = told.measurement(known)
    free, usual_device = machine.free, device  # of other models, if this one gets the CPU alone
    if chooses:
        fit, why = fit_on_faster(blueprint, machine.free, options, measurement)
        if why is not None:
            reason = on_cpu_because(machine.gpu or "", why)
            device, machine = CPU, machine.without_gpus()
    planned = plan_model(machine, device, fit, measurement)

    def by_arithmetic(other: Blueprint) -> Measurement:
        # Figures of another moment would compare the machine's load, and not the models. On a busy
        # machine 4 bits had 1.6 to 7 tok/s, and 3 bits of a second measurement 8 to 9.6.
        return told.measurement(scaled(known, blueprint, other))

    sizes = [Size("4", fit, planned.expected)]
    for bits in tuple(DEMO_LOSS)[1:]:
        with suppress(ResourceError, UsageError):  # it does not fit, or stays as it was published
            smaller = fit_model(
                expected_mix(blueprint, ExpertSize.parse(bits)), machine.free, options
            )
            expected = expect_fit(smaller, device, by_arithmetic(smaller.blueprint))
            sizes.append(Size(bits, smaller, expected))
    if outline.installed or "--expert-bits" in outline.arguments or len(sizes) == 1:
        sizes = []  # a person chose already, or has no choice
    fits = fit_known(catalog or {}, free, usual_device, options, by_arithmetic, chooses=chooses)
    return replace(
        planned,
        starting=starting,
        told=told,
        known=tuple(fits),
        sizes=tuple(sizes),
        reason=reason,
    )


def _first_fit(
    blueprint: Blueprint, free: FreeMemory, options: LoadOptions, *, chooses: bool
) -> MemoryPlan:
    """Return the places on the GPUs or, if it may be, on the CPU, before anything is measured."""
    try:
        return fit_model(blueprint, free, options)
    except ResourceError:
        if not chooses:
            raise
        return fit_model(blueprint, free.without_gpus(), options)


def in_mix(outline: Outline, bits: ExpertSize) -> Outline:
    """Return the outline of the model with experts of other bits.

    It is the model itself if it is installed so. Raises `UsageError`.
    """
    if outline.installed and has_bits(outline.blueprint, bits):
        return outline
    arguments = (*(outline.arguments or (outline.name,)), "--expert-bits", str(bits))
    blueprint = expected_mix(outline.blueprint, bits)
    return replace(outline, blueprint=blueprint, installed=False, arguments=arguments)


def _measurement(
    outline: Outline,
    blueprint: Blueprint,
    device: torch.device,
    reporter: Reporter,
    programs: OtherPrograms,
    *,
    again: bool,
) -> Measurement:
    """Return the saved measurement for a model, or measure this machine if it is outdated."""
    saved = None if again else saved_measurement(blueprint, outline.directory, device)
    if saved is not None:
        reason = saved.outdated(time.time())
        if outline.installed and not is_installed(Path(saved.directory)):
            # A host's cache gives what was just written several times as fast.
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
