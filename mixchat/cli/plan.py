"""`mixchat plan`: how a model fits on this machine and how fast it runs, before a download."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixchat.base.errors import UsageError
from mixchat.base.machine import OtherPrograms
from mixchat.base.options import LoadOptions
from mixchat.base.quantities import format_age, parse_rate, parse_size, parse_sizes
from mixchat.chat.printing import show, show_lines
from mixchat.cli.flags import model_flags
from mixchat.cli.flags.checks import checked_bits
from mixchat.cli.flags.quantization import ExpertBits
from mixchat.cli.output.failure import note
from mixchat.cli.output.show_progress import show_progress, status
from mixchat.engine.environment import prepare_environment

if TYPE_CHECKING:
    import torch

    from mixchat.planning.hardware import ToldMachine
    from mixchat.planning.machine_speeds import Measurement
    from mixchat.planning.plan import MachinePlan
    from mixchat.planning.worker_split import WorkerOffer
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
    expert_bits: ExpertBits = None,
    ram: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Plan for a machine with so much RAM (16GB), not for this one."
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="For one with such a GPU: 24GB, or 12GB,8GB for two GPUs."
        ),
    ] = None,
    disk_speed: Annotated[
        str | None, typer.Option(metavar="RATE", help="For one whose disk reads so fast: 3GB/s.")
    ] = None,
    free_disk: Annotated[
        str | None, typer.Option(metavar="SIZE", help="For one with so much free disk: 100GB.")
    ] = None,
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

    --ram, --gpu, --disk-speed and --free-disk tell about another machine. What is not told is this
    machine's, also the speed of the CPU. A GPU that cannot be measured here gets the speeds of a
    cheap card, which the plan names.
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
    told = {
        "ram": _told("--ram", ram, parse_size),
        "gpus": _told("--gpu", gpu, parse_sizes) or (),
        "disk_speed": _told("--disk-speed", disk_speed, parse_rate),
        "free_disk": _told("--free-disk", free_disk, parse_size),
    }
    if told["gpus"] and device is not None:
        raise UsageError("--gpu tells about a GPU of another machine, --device names one of this")
    bits = None if expert_bits is None else int(expert_bits)
    from mixchat.weights import models

    others = OtherPrograms()
    ref = models.resolve(model)  # a name that means nothing is refused before torch loads
    prepare_environment()
    from mixchat.cli.output.plan_json import plan_as_dict
    from mixchat.cli.output.plan_text import plan_as_text
    from mixchat.planning.hardware import ToldMachine
    from mixchat.weights.make.outline import outline

    with show_progress() as progress:
        outlined = outline(ref, progress, bits, told["free_disk"])
    made = _plan(outlined, options, ToldMachine(**told), _Speeds(outlined, others, again=measure))
    if as_json:
        show(json.dumps(plan_as_dict(outlined, made), indent=2))
    else:
        show_lines(plan_as_text(outlined, made))


def _told(flag: str, text: str | None, parse: Callable[[str], Any]) -> Any:
    """Return what a flag tells, None if it is not given. Raises `UsageError` with its name."""
    try:
        return None if text is None else parse(text)
    except UsageError as error:
        raise UsageError(f"{flag}: {error}", hint=error.hint) from None


def _plan(
    outlined: Outline, options: LoadOptions, told: ToldMachine, speeds: _Speeds
) -> MachinePlan:
    from mixchat.engine.report import report_path, saved_uses
    from mixchat.loading.loader import choose_devices
    from mixchat.planning.fitting import fit_model
    from mixchat.planning.hardware import Machine
    from mixchat.planning.plan import plan_model, plan_variant
    from mixchat.planning.torch_threads import choose_threads
    from mixchat.weights.make.quantize_options import in_3_bits

    devices, blueprint = choose_devices(options.device), told.layout(outlined.blueprint)
    here, device = devices[0], told.device(devices[0])
    machine = told.machine(Machine.now(outlined.directory, devices))
    fit = fit_model(blueprint, machine.free, options)  # refuses before anything is measured
    choose_threads(blueprint)
    offers = _offers(outlined, options)
    known = speeds.of(here, told.measurable(fit, here))
    measurement = told.measurement(known, fit.computed, device)
    uses = saved_uses(report_path(outlined.name))
    made = replace(plan_model(machine, device, fit, measurement, offers, uses), told=told)
    is_chosen = outlined.installed or "--expert-bits" in outlined.arguments
    small = None if is_chosen else in_3_bits(blueprint)
    if small is None:
        return made
    other = fit_model(small, machine.free, options)
    compared = speeds.of_a_second(here, told.measurable(other, here))
    if compared is None:
        return made
    compared = told.measurement(compared, other.computed, device)
    return replace(made, in_3_bits=plan_variant(device, other, compared))


class _Speeds:
    """The speeds of this machine: saved ones, or new ones, which all are measured before one end.

    others: the other programs since `plan` began; again: measure what is saved, too.
    """

    def __init__(self, outlined: Outline, others: OtherPrograms, *, again: bool) -> None:
        self._outlined, self._others, self._again = outlined, others, again
        self._notes: set[str] = set()
        self._until: float | None = None  # None if nothing was measured yet

    def of(self, device: torch.device, form: Blueprint) -> Measurement:
        """Return the saved measurement of a form, or measure this machine if it is outdated."""
        from mixchat.planning.measuring import measure_machine, measuring_ends

        if (saved := self._saved(device, form)) is not None:
            return saved
        self._until = self._until or measuring_ends()
        with status("measuring this machine (20 s at most)"):
            return measure_machine(form, self._outlined.directory, device, self._until)

    def of_a_second(self, device: torch.device, form: Blueprint) -> Measurement | None:
        """Return the same for a second form; None, with a note, if the time for it is over."""
        if self._until is None or time.perf_counter() < self._until:
            return self.of(device, form)
        if (saved := self._saved(device, form)) is None:
            note("3 bits are not compared: this machine is busy, and measuring took long enough")
        return saved

    def _saved(self, device: torch.device, form: Blueprint) -> Measurement | None:
        from mixchat.planning.machine_speeds import BUSY
        from mixchat.planning.measuring import saved_measurement

        saved = saved_measurement(form, self._outlined.directory, device)
        if saved is None or self._again:
            return None
        why = self._outdated(saved)
        if why is None:
            return saved
        if self._others.share() > BUSY:
            age = format_age(time.time() - saved.measured_at)
            self._note_once(f"this machine is busy, so the speeds measured {age} are used")
            return saved
        self._note_once(f"measuring this machine again: {why}")
        return None

    def _note_once(self, text: str) -> None:
        """Print a note, unless it stands there already, for another form."""
        if text not in self._notes:
            note(text)
        self._notes.add(text)

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
