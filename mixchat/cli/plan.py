"""`mixchat plan`: how a model fits on this machine and how fast it runs, before a download."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixchat.chat.printing import show, show_lines
from mixchat.cli.flags import model_flags
from mixchat.cli.flags.checks import checked_bits
from mixchat.cli.output.failure import note
from mixchat.cli.output.show_progress import show_progress, status
from mixchat.engine.environment import prepare_environment
from mixchat.errors import UsageError
from mixchat.machine import OtherPrograms
from mixchat.options import LoadOptions
from mixchat.quantities import format_age

if TYPE_CHECKING:
    import torch

    from mixchat.planning.calibration import Measurement
    from mixchat.planning.plan import MachinePlan
    from mixchat.planning.spread import WorkerOffer
    from mixchat.weights.format.blueprint import Blueprint
    from mixchat.weights.make.outline import Outline


def plan(
    model: Annotated[
        str,
        model_flags.model_argument(
            "base, instruct, demo, ORG/NAME on the hub, a directory, or an installed model."
        ),
    ] = "instruct",
    ctx_size: model_flags.ContextSize = None,
    parallel: model_flags.Parallel = 1,
    kv_bits: model_flags.KVBits = None,
    host_memory: model_flags.HostMemory = None,
    device_memory: model_flags.DeviceMemory = None,
    device: model_flags.Device = None,
    worker: model_flags.Worker = None,
    key_file: model_flags.KeyFile = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure this machine again (20 s at most).")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Predict whether a model fits here, and how fast it runs.

    The first plan for a model's shape measures the speed of the disk, of memory and of computing.
    The figures are saved with their date in machine.json in the data directory (MIXCHAT_HOME), and
    are measured again after a month, or if other programs were busy the last time. While they are
    busy, the saved figures are used. Each speed is a range: the speed by the slowest of several
    samples, and by the fastest. 'run --verbose' prints what was predicted beside what came.
    """
    options = LoadOptions(
        host_memory=model_flags.budget(host_memory),
        device_memory=model_flags.budgets(device_memory),
        context_size=ctx_size,
        kv_bits=checked_bits(kv_bits),
        parallel=parallel,
        device=device,
        workers=tuple(worker or ()),
        key_file=model_flags.key_path(key_file),
    )
    from mixchat.weights import models

    others = OtherPrograms()
    ref = models.resolve(model)  # a name that means nothing is refused before torch loads
    prepare_environment()
    from mixchat.cli.output.plan_json import plan_as_dict
    from mixchat.cli.output.plan_text import plan_as_text
    from mixchat.weights.make.outline import outline

    with show_progress() as progress:
        outlined = outline(ref, progress)
    made = _plan(outlined, options, others, measure)
    if as_json:
        show(json.dumps(plan_as_dict(outlined, made), indent=2))
    else:
        show_lines(plan_as_text(outlined, made))


def _plan(
    outlined: Outline, options: LoadOptions, others: OtherPrograms, measure_again: bool
) -> MachinePlan:
    from mixchat.engine.report import saved_uses
    from mixchat.engine.report_path import report_path
    from mixchat.loading.loader import choose_devices
    from mixchat.planning.fitting import fit_model
    from mixchat.planning.plan import Machine, plan_form, plan_model
    from mixchat.planning.torch_threads import choose_threads
    from mixchat.weights.make.quantize_options import in_3_bits

    devices, blueprint = choose_devices(options.device), outlined.blueprint
    device = devices[0]
    machine = Machine.now(outlined.directory, devices)
    fit = fit_model(blueprint, machine.free, options)  # refuses before anything is measured
    choose_threads(blueprint)
    offers = _offers(outlined, options)
    speeds = _Speeds(outlined, device, others, again=measure_again)
    measurement = speeds.saved_or_measured(fit.computed)
    uses = saved_uses(report_path(outlined.name))
    made = plan_model(machine, device, fit, measurement, offers, uses)
    small = None if outlined.installed else in_3_bits(blueprint)
    if small is None:
        return made
    other = fit_model(small, machine.free, options)
    compared = speeds.if_there_is_time(other.computed)
    return replace(made, in_3_bits=compared and plan_form(device, other, compared))


class _Speeds:
    """The speeds of this machine: saved ones, or new ones, which all are measured before one end.

    others: the other programs since `plan` began; again: measure what is saved, too.
    """

    def __init__(
        self, outlined: Outline, device: torch.device, others: OtherPrograms, *, again: bool
    ) -> None:
        self._outlined, self._device, self._again = outlined, device, again
        self._others, self._until = others, 0.0

    def saved_or_measured(self, blueprint: Blueprint) -> Measurement:
        """Return the saved measurement, or measure this machine if that is outdated."""
        from mixchat.planning.machine_speed import measuring_ends

        if (saved := self._saved(blueprint)) is not None:
            return saved
        self._until = self._until or measuring_ends()
        return self._measured(blueprint)

    def if_there_is_time(self, blueprint: Blueprint) -> Measurement | None:
        """Return the same for a second form; None, with a note, if the time for it is over."""
        if not self._until or time.perf_counter() < self._until:
            return self.saved_or_measured(blueprint)
        if (saved := self._saved(blueprint)) is None:
            note("3 bits are not compared: measuring took long enough, for this machine is busy")
        return saved

    def _measured(self, blueprint: Blueprint) -> Measurement:
        from mixchat.planning.machine_speed import measure_machine

        with status("measuring this machine (20 s at most)"):
            return measure_machine(blueprint, self._outlined.directory, self._device, self._until)

    def _saved(self, blueprint: Blueprint) -> Measurement | None:
        from mixchat.planning.calibration import BUSY
        from mixchat.planning.machine_speed import saved_measurement

        saved = saved_measurement(blueprint, self._outlined.directory, self._device)
        if saved is None or self._again:
            return None
        why = self._outdated(saved)
        if why is None:
            return saved
        if self._others.share() > BUSY:
            age = format_age(time.time() - saved.measured_at)
            note(f"this machine is busy, so the speeds measured {age} are used")
            return saved
        note(f"measuring this machine again: {why}")
        return None

    def _outdated(self, saved: Measurement) -> str | None:
        from mixchat.weights.format.manifest import is_installed

        if self._outlined.installed and not is_installed(Path(saved.directory)):
            return "the last time a file just written was read, not the model"
        return saved.outdated(time.time())


def _offers(outlined: Outline, options: LoadOptions) -> list[WorkerOffer]:
    if not options.workers:
        return []
    if not outlined.installed:
        raise UsageError(
            f"--worker is for an installed model, and {outlined.name} is not installed",
            hint="Workers serve only the same model as this machine's: install it on each of them.",
        )
    from mixchat.loading.workers import ask_workers
    from mixchat.weights.format.installed_model import InstalledModel

    with status("asking the workers"), InstalledModel(outlined.directory) as installed:
        return ask_workers(installed, options)
