"""`mixchat plan`: a model's fit and speed on this machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from mixchat.base.errors import ResourceError, UsageError
from mixchat.base.machine import OtherPrograms
from mixchat.base.quantities import parse_rate, parse_size, parse_sizes
from mixchat.cli.flags import load_flags
from mixchat.cli.flags.settings import MACHINE, is_given
from mixchat.cli.output.progress import TerminalReporter
from mixchat.engine.environment import prepare_environment


def plan(
    context: typer.Context,
    model: Annotated[
        str,
        load_flags.model_argument(
            "instruct, qwen3, gpt-oss or another of the table, demo, ORG/NAME on the hub, "
            "ORG/NAME:Q4_K_M (in GGUF), a directory or .gguf file, or an installed model."
        ),
    ] = "instruct",
    ctx_size: load_flags.ContextSize = None,
    parallel: load_flags.Parallel = 1,
    kv_bits: load_flags.KVBits = None,
    host_memory: load_flags.HostMemory = None,
    device_memory: load_flags.DeviceMemory = None,
    device: load_flags.Device = None,
    worker: load_flags.Worker = None,
    key_file: load_flags.KeyFile = None,
    expert_bits: load_flags.ExpertBits = None,
    ram: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            rich_help_panel=MACHINE,
            help="Plan for a machine with so much RAM (16GB), not for this one.",
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            rich_help_panel=MACHINE,
            help="For one with such a GPU: 24GB, or 12GB,8GB for two GPUs.",
        ),
    ] = None,
    disk_speed: Annotated[
        str | None,
        typer.Option(
            metavar="RATE",
            rich_help_panel=MACHINE,
            help="For one whose disk reads so fast: 3GB/s.",
        ),
    ] = None,
    free_disk: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            rich_help_panel=MACHINE,
            help="For one with so much free disk: 100GB.",
        ),
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure this machine again (20 s at most).")
    ] = False,
    as_json: load_flags.AsJson = False,
) -> None:
    """Predict whether a model fits here, and how fast it runs.

    The first plan for a model's shape measures the speed of the disk, of memory and of computing.
    The figures are saved with their date in machine.json in the data directory (MIXCHAT_HOME), and
    are measured again after a month, or if other programs were busy the last time. While they are
    busy, the saved figures are used. Each speed is a range from the slowest of several samples to
    the fastest. 'run --verbose' prints the predicted speed next to the measured one.

    Without a MODEL it also compares all known models, by arithmetic from the same figures.

    --ram, --gpu, --disk-speed and --free-disk tell about another machine. Figures that are not told
    are this machine's, also the speed of the CPU. A GPU that cannot be measured here gets the
    speeds of a cheap card, which the plan names.
    """
    others = OtherPrograms()
    options = load_flags.load_options(context.params)
    told = {
        "ram": _told("--ram", ram, parse_size),
        "gpus": _told("--gpu", gpu, parse_sizes) or (),
        "disk_speed": _told("--disk-speed", disk_speed, parse_rate),
        "free_disk": _told("--free-disk", free_disk, parse_size),
    }
    if told["gpus"] and device is not None:
        raise UsageError("--gpu tells about a GPU of another machine, --device names one of this")
    from mixchat.weights import models

    ref = models.resolve(model)  # refuses a wrong name before torch loads
    prepare_environment()
    from mixchat.cli.output.plan_report import PlanReport
    from mixchat.loading.plan import in_mix
    from mixchat.loading.plan import plan as plan_machine
    from mixchat.planning.hardware import ToldMachine
    from mixchat.weights.make.mix import is_for_calibration
    from mixchat.weights.make.outline import known_blueprints, outline

    reporter, size = TerminalReporter(), load_flags.parse_expert_bits(expert_bits, ctx_size)
    mix = size if size is not None and is_for_calibration(size) else None
    bits = None if size is None or mix is not None else size.whole
    catalog = {} if is_given(context, "model") else known_blueprints()

    def report_on(ref: models.ModelRef) -> PlanReport:
        with reporter.progress() as progress:
            found = outline(ref, progress, bits, told["free_disk"])
        if mix is not None:
            found = in_mix(found, mix)
        made = plan_machine(
            found,
            options,
            reporter,
            told=ToldMachine(**told),
            others=others,
            again=measure,
            catalog=catalog,
        )
        return PlanReport(found, made)

    try:
        report = report_on(ref)
    except ResourceError:
        if not catalog or options.host_memory or options.device_memory:
            raise
        smallest = min(catalog, key=lambda names: catalog[names].weights_size)[0]
        reporter.note(f"{model} does not fit into memory, so this is the plan of {smallest}")
        report = report_on(models.resolve(smallest))
    report.show(as_json)


def _told(flag: str, text: str | None, parse: Callable[[str], Any]) -> Any:
    """Parse the figure of a flag. Raises `UsageError` with the flag's name."""
    try:
        return None if text is None else parse(text)
    except UsageError as error:
        raise UsageError(f"{flag}: {error}", hint=error.hint) from None
