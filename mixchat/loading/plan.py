"""Plans a model on this machine, or on one that a person describes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from mixchat.base.errors import ResourceError, UsageError
from mixchat.base.machine import OtherPrograms
from mixchat.base.options import ExpertSize, LoadOptions
from mixchat.base.progress import Reporter
from mixchat.base.quantities import format_age
from mixchat.engine.report import report_path, saved_uses
from mixchat.loading.loader import choose_devices
from mixchat.loading.workers import ask_workers
from mixchat.planning.fitting import MemoryPlan, expected_mix, fit_model, has_bits
from mixchat.planning.hardware import Machine, ToldMachine
from mixchat.planning.machine_speeds import BUSY, Measurement
from mixchat.planning.measuring import measure_machine, measuring_ends, saved_measurement
from mixchat.planning.plan import MachinePlan, Variant, fit_known, plan_model, plan_variant, scaled
from mixchat.planning.torch_threads import choose_threads
from mixchat.planning.worker_split import WorkerOffer
from mixchat.weights.format.blueprint import Blueprint
from mixchat.weights.format.installed_model import InstalledModel
from mixchat.weights.format.manifest import is_installed
from mixchat.weights.make.outline import Outline
from mixchat.weights.make.quantize_options import DEMO_LOSS_CALIBRATED, in_3_bits


def plan(
    outline: Outline,
    options: LoadOptions,
    reporter: Reporter,
    *,
    told: ToldMachine,
    others: OtherPrograms,
    again: bool = False,
    catalog: Mapping[tuple[str, ...], Blueprint] | None = None,
) -> MachinePlan:
    """Return the plan for a model, and measure the machine if that is needed, or `again`.

    `told` has the figures of another machine, and `others` the programs since the command began.
    The models of `catalog`, by their names, are compared by arithmetic from the same figures.
    Raises `MixchatError` if the model does not fit, an option cannot be used, or a worker fails.
    """
    devices, blueprint = choose_devices(options.device), outline.blueprint
    if told.layout is not None:  # which an installed model need not have here
        blueprint = blueprint.in_layout(told.layout)
    here, device = devices[0], told.device(devices[0])
    machine = told.machine(Machine.now(outline.directory, devices))
    fit = fit_model(blueprint, machine.free, options)  # refuses before anything is measured
    choose_threads(blueprint)
    offers = _offers(outline, options, reporter)
    speeds = _Speeds(outline, here, reporter, others, again=again)
    known = speeds.of(told.measurable(fit, here))
    measurement = told.measurement(known, fit.computed, device)
    uses = saved_uses(report_path(outline.name))
    made = replace(plan_model(machine, device, fit, measurement, offers, uses), told=told)

    def by_arithmetic(other: MemoryPlan) -> Measurement:
        shape = told.measurable(other, here)
        own = speeds.recent(shape) or scaled(known, told.measurable(fit, here), shape)
        return told.measurement(own, other.computed, device)

    if catalog:
        fits = fit_known(catalog, machine.free, device, options, by_arithmetic)
        made = replace(made, known=tuple(fits))
    is_chosen = outline.installed or "--expert-bits" in outline.arguments
    small = None if is_chosen else in_3_bits(blueprint)
    if small is None:
        return made
    made = replace(made, mixes=tuple(_mixes(device, blueprint, made, by_arithmetic)))
    other = fit_model(small, machine.free, options)
    compared = speeds.of_a_second(told.measurable(other, here))
    if compared is None:
        return made
    compared = told.measurement(compared, other.computed, device)
    return replace(made, in_3_bits=plan_variant("3", device, other, compared))


def _mixes(
    device: torch.device,
    blueprint: Blueprint,
    plan: MachinePlan,
    measured: Callable[[MemoryPlan], Measurement],
) -> Iterator[Variant]:
    """Yield the model with mixes of types that fit."""
    free, options = plan.machine.free, plan.fit.options
    for bits in DEMO_LOSS_CALIBRATED:
        with suppress(ResourceError, UsageError):
            fit = fit_model(expected_mix(blueprint, ExpertSize.parse(bits)), free, options)
            yield plan_variant(bits, device, fit, measured(fit))


def in_mix(outline: Outline, bits: ExpertSize) -> Outline:
    """Return the outline of the model with experts of other bits.

    It is the model itself if it is installed so. Raises `UsageError`.
    """
    if outline.installed and has_bits(outline.blueprint, bits):
        return outline
    arguments = (*(outline.arguments or (outline.name,)), "--expert-bits", str(bits))
    made = expected_mix(outline.blueprint, bits)
    return replace(outline, blueprint=made, installed=False, arguments=arguments)


def _offers(outline: Outline, options: LoadOptions, reporter: Reporter) -> list[WorkerOffer]:
    if not options.workers:
        return []
    if not outline.installed:
        raise UsageError(
            f"--worker is for an installed model, and {outline.name} is not installed",
            hint="Workers serve only the same model as this machine's: install it on each of them.",
        )
    with reporter.status("asking the workers"), InstalledModel(outline.directory) as installed:
        return ask_workers(installed, options)


class _Speeds:
    """The speeds of this machine, saved or new. All measuring ends at the same time."""

    def __init__(
        self,
        outline: Outline,
        device: torch.device,
        reporter: Reporter,
        others: OtherPrograms,
        *,
        again: bool,
    ) -> None:
        self._outline, self._device, self._reporter = outline, device, reporter
        self._others, self._again = others, again
        self._notes: set[str] = set()
        self._until: float | None = None  # None if nothing was measured yet

    def of(self, blueprint: Blueprint) -> Measurement:
        """Return the saved measurement, or measure this machine if it is outdated."""
        if (saved := self._saved(blueprint)) is not None:
            return saved
        self._until = self._until or measuring_ends()
        with self._reporter.status("measuring this machine (20 s at most)"):
            return measure_machine(blueprint, self._outline.directory, self._device, self._until)

    def of_a_second(self, blueprint: Blueprint) -> Measurement | None:
        """Return the same for a second model, or None and a note if the time is over."""
        if self._until is None or time.perf_counter() < self._until:
            return self.of(blueprint)
        if (saved := self._saved(blueprint)) is None:
            self._reporter.note(
                "3 bits are not compared: this machine is busy, and measuring took long enough"
            )
        return saved

    def recent(self, blueprint: Blueprint) -> Measurement | None:
        """Return the saved measurement if it is not outdated."""
        saved = saved_measurement(blueprint, self._outline.directory, self._device)
        return saved if saved is not None and saved.outdated(time.time()) is None else None

    def _saved(self, blueprint: Blueprint) -> Measurement | None:
        saved = saved_measurement(blueprint, self._outline.directory, self._device)
        if saved is None or self._again:
            return None
        reason = self._outdated(saved)
        if reason is None:
            return saved
        if self._others.share() > BUSY:
            age = format_age(time.time() - saved.measured_at)
            self._note_once(f"this machine is busy, so the speeds measured {age} are used")
            return saved
        self._note_once(f"measuring this machine again: {reason}")
        return None

    def _note_once(self, text: str) -> None:
        if text not in self._notes:
            self._reporter.note(text)
        self._notes.add(text)

    def _outdated(self, saved: Measurement) -> str | None:
        if self._outline.installed and not is_installed(Path(saved.directory)):
            return "the last time a file just written was read, not the model"
        return saved.outdated(time.time())
