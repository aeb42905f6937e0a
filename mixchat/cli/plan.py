"""`mixchat plan`: a model's fit and speed on this machine."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import typer

from mixchat.base.errors import ResourceError, UsageError
from mixchat.base.machine import OtherPrograms
from mixchat.base.options import LoadOptions
from mixchat.base.quantities import parse_size
from mixchat.cli.flags import load_flags
from mixchat.cli.flags.settings import MACHINE, is_given, loading, option
from mixchat.cli.output.progress import TerminalReporter
from mixchat.engine.environment import prepare_environment
from mixchat.planning.cards import parse_cards

_PER_SECOND = re.compile(r"\s*/\s*s\s*$", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class PlanFlags:
    """The flags of `mixchat plan`."""

    model: str = load_flags.model_argument(
        load_flags.ANY_MODEL, "instruct", show_default="the recommended one"
    )
    ram: str | None = option(
        "--ram SIZE", "Plan for a machine with this RAM, such as 16GB.", MACHINE
    )
    gpu: str | None = option(
        "--gpu CARD",
        "Plan for a machine with this GPU, such as 'RTX 4060', '2x RTX 3090' or 24GB.",
        MACHINE,
    )
    disk_speed: str | None = option(
        "--disk-speed RATE", "Plan for a machine whose disk reads so fast, such as 3GB/s.", MACHINE
    )
    free_disk: str | None = option(
        "--free-disk SIZE", "Plan for a machine with this much free disk, such as 100GB.", MACHINE
    )
    load: Mapping[str, Any] = loading(
        *load_flags.TAKING_MEMORY, "kv_bits", "context_size", "parallel"
    )
    expert_bits: str | None = load_flags.expert_bits("4")
    measure: bool = option("--measure", "Measure this machine again (20 s at most).")
    as_json: bool = load_flags.JSON


def plan(context: typer.Context, flags: PlanFlags) -> None:
    """Predict whether a model fits here, and how fast it runs.

    Without a MODEL, it recommends one and compares all known ones. The recommended one has the
    highest score of those that memory holds and that are faster than a person reads. With a MODEL,
    it compares experts in fewer bits. All speeds are estimates that follow from one measurement.
    No weights are downloaded.

    A person reads about 5 tokens a second. 'experts' says where the experts will be: the more of
    them are on disk, the slower the model is. 'disk' is what remains of the download. GPQA is the
    part of hard questions about science that the model answers right, as its maker published.
    Guessing gives 25%. Makers test in their own ways, so a few percent say nothing. A MODEL's
    'needs' and 'context' are memory, and 'meanwhile' is the time in which reading and computing
    overlap.

    The first plan measures the disk, memory and CPU or GPU, and saves the speeds in machine.json
    in the data directory (MIXCHAT_HOME). After a month they are measured again. If other programs
    are busy, saved speeds are used. 'mixchat run --verbose' prints the estimate next to the
    measured speed.

    --ram, --gpu, --disk-speed and --free-disk describe another machine, or this one with more
    memory. Everything else is taken from this machine, also the speed of the CPU. The names of
    common cards of NVIDIA and AMD stand for the figures of their data sheets. A size alone stands
    for a cheap card. Workers do not count. 'mixchat bench --worker HOST' measures the speed with
    them.
    """
    programs = OtherPrograms()
    options = LoadOptions(**flags.load)
    figures = {
        "ram": _told("--ram", flags.ram, parse_size),
        "gpus": _told("--gpu", flags.gpu, parse_cards) or (),
        "disk_speed": _told(
            "--disk-speed", flags.disk_speed, lambda text: parse_size(_PER_SECOND.sub("", text))
        ),
        "free_disk": _told("--free-disk", flags.free_disk, parse_size),
    }
    if figures["gpus"] and options.device is not None:
        raise UsageError("--gpu tells about a GPU of another machine, --device names one of this")
    from mixchat.install import models

    ref = models.resolve(flags.model)  # refuses a wrong name before torch loads
    prepare_environment()
    from mixchat.cli.output.plan_report import PlanReport
    from mixchat.install.make.mix import is_for_calibration
    from mixchat.install.make.outline import known_blueprints, outline
    from mixchat.loading.plan import in_mix
    from mixchat.loading.plan import plan as plan_machine
    from mixchat.planning.hardware import ToldMachine

    reporter = TerminalReporter()
    size = load_flags.parse_expert_bits(flags.expert_bits, options.context_size)
    mix = size if size is not None and is_for_calibration(size) else None
    bits = None if size is None or mix is not None else size.whole
    told = ToldMachine(**figures)
    names_one = is_given(context, "model") or size is not None
    catalog = {} if names_one else known_blueprints()

    def report_on(ref: models.ModelRef) -> PlanReport:
        with reporter.progress() as progress:
            planned = outline(ref, progress, bits, told.free_disk)
        if mix is not None:
            planned = in_mix(planned, mix)
        machine_plan = plan_machine(
            planned,
            options,
            reporter,
            told=told,
            programs=programs,
            again=flags.measure,
            catalog=catalog,
        )
        if machine_plan.recommended is not None:
            ref = models.resolve(machine_plan.recommended[0])
            with reporter.progress() as progress:
                planned = outline(ref, progress, free_disk=told.free_disk)
        return PlanReport(planned, machine_plan)

    try:
        report = report_on(ref)
    except ResourceError:
        # A person who named no model wants to know which ones fit.
        if not catalog or options.host_memory or options.device_memory:
            raise
        smallest = min(catalog, key=lambda names: catalog[names].weights_size)[0]
        report = report_on(models.resolve(smallest))
    report.show(flags.as_json)


def _told(flag: str, text: str | None, parse: Callable[[str], Any]) -> Any:
    """Parse the figure of a flag. Raises `UsageError` with the flag's name."""
    try:
        return None if text is None else parse(text)
    except UsageError as error:
        raise UsageError(f"{flag}: {error}", hint=error.hint) from None
