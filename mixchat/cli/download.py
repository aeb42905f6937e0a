"""`mixchat download` and `mixchat calibrate`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from mixchat.base.errors import UsageError
from mixchat.base.quantities import format_time
from mixchat.chat.printing import say, show, show_lines
from mixchat.cli.flags import load_flags
from mixchat.cli.flags.arguments import checked, read_beginning
from mixchat.cli.flags.load_flags import parse_dense_bits, parse_expert_bits
from mixchat.cli.flags.settings import option
from mixchat.cli.flags.shell_completion import runnable_models
from mixchat.cli.output.messages import note
from mixchat.cli.output.progress import TerminalReporter, resumable
from mixchat.engine.environment import prepare_environment

if TYPE_CHECKING:
    from mixchat.base.options import ExpertSize
    from mixchat.base.progress import Progress, Reporter
    from mixchat.cli.output.reports import DownloadReport
    from mixchat.install.make.download import DownloadRequest
    from mixchat.install.make.download_plan import DownloadPlan
    from mixchat.loading.calibrate import OnWindow


@dataclass(frozen=True, kw_only=True)
class CalibrateFlags:
    """The flags of a calibration."""

    expert_bits: str | None = load_flags.expert_bits("4")
    ctx_size: int | None = load_flags.CONTEXT_SIZE
    calibrate_text: Path | None = option(
        "--calibrate-text FILE", "Calibrate with the text of FILE, not with the model's own."
    )


@dataclass(frozen=True, kw_only=True)
class DownloadFlags(CalibrateFlags):
    """The flags of `mixchat download`."""

    model: str = typer.Argument(
        metavar="MODEL", autocompletion=runnable_models, help=load_flags.ANY_MODEL
    )
    name: str | None = option("--name NAME", "Install the model under this name.")
    revision: str | None = option("--revision REV", "Commit, branch or tag on the hub.")
    dense_bits: str | None = load_flags.dense_bits(
        f"{load_flags.DEFAULT_DENSE_BITS}; 16 with --expert-bits 16"
    )
    calibrate: bool = option("--calibrate", "Re-quantize the experts with GPTQ on sample text.")
    keep_source: bool = option("--keep-source", "Keep the fetched files in Hugging Face's cache.")
    dry_run: bool = option("--dry-run", "Print the plan and do nothing.")
    as_json: bool = load_flags.JSON


def download(context: typer.Context, flags: DownloadFlags) -> None:
    """Download and quantize a model, or resume a download.

    The same command resumes an interrupted download. While one file of weights is fetched, the
    one before it is quantized and deleted. So the disk holds the result and two files at most.
    Every file is checked against the hub's SHA-256. Only safetensors, GGUF, JSON and tokenizer
    files are fetched.

    ORG/NAME:KIND is a model in GGUF. Without a KIND, a repository's kinds are listed if it has
    several. GGUF is quantized again, to mixchat's own form. Checkpoints that bitsandbytes has
    quantized, and experts in MXFP4, as in gpt-oss, are copied without rounding again.

    With --expert-bits 3 Mixtral's experts take 17.6 GB instead of 24.0, at a cost in quality that
    'mixchat plan' names. --expert-bits 16 does not quantize. Bits between, such as 2.4, give the
    layers that need it a larger type. A size, such as 14GB, is enough memory for the whole
    model, for a context of --ctx-size tokens, and for what is left free. For 2 bits, bits between
    and sizes, the model is first installed in 4 bits. A calibration to the wanted bits follows.
    --dry-run says how long that takes.

    Attention and head get 8 bits, at hardly any cost in quality. In models of small experts, such
    as Qwen3, a token reads as many bytes of them as of experts. So they get 6 bits there.
    Decoding is then a tenth faster, and perplexity rises by 1 to 2%. For Mixtral, --dense-bits 16
    takes 1.4 GB more than 8, and 4 takes 0.7 GB less, at some cost in quality.
    """
    from mixchat.install import models

    text = _text(flags)
    ref = models.resolve(checked(flags.model, "the model's name"), key=flags.name)
    bits = parse_dense_bits(flags.dense_bits)
    wanted = parse_expert_bits(flags.expert_bits, flags.ctx_size)
    if flags.expert_bits == "16" and not set(bits) <= {None, 16}:
        raise UsageError("--expert-bits 16 leaves the attention and the head unquantized, too")
    prepare_environment()
    from mixchat.install.make.download import DownloadRequest
    from mixchat.install.make.mix import is_for_calibration
    from mixchat.install.make.quantize_options import QuantizeOptions
    from mixchat.text.checkpoint_text import check_text
    from mixchat.weights.matrix.linear import type_of_bits

    remade = wanted if wanted is not None and is_for_calibration(wanted) else None
    whole = 4 if wanted is None or remade else wanted.whole
    options = QuantizeOptions(type_of_bits(whole or 4), *bits)
    if flags.revision is not None:
        checked(flags.revision, "--revision")
    request = DownloadRequest(
        ref, options, flags.revision, flags.keep_source, check_text, remade is not None
    )
    reporter = TerminalReporter()
    with reporter.progress() as progress:
        if flags.dry_run:
            _show_plan(request, progress, flags.as_json, remade)
            return
        result = _download(request, progress, remade)
        wants = flags.calibrate or text is not None or remade is not None
        if wants and not _is_calibrated(ref.directory, remade):
            _calibrate(ref.directory, text, progress, reporter, bits=remade)
    if flags.as_json:
        show(json.dumps(result, indent=2))
    say(f"{ref.key} is ready in {result['path']}")


@dataclass(frozen=True, kw_only=True)
class RecalibrateFlags(CalibrateFlags):
    """The flags of `mixchat calibrate`."""

    model: str = load_flags.INSTALLED
    expert_bits: str | None = load_flags.expert_bits("as they are", ("4", "3", "2"))
    windows: int | None = option(
        "--windows N",
        "Calibrate with N windows of 512 tokens.",
        min=5,
        max=512,
        show_default="by the model's shape and this machine's speed",
    )


def calibrate(context: typer.Context, flags: RecalibrateFlags) -> None:
    """Re-quantize a model's experts with GPTQ on sample text.

    The model loses less quality afterwards, and keeps its size and speed. --expert-bits gives the
    experts other bits. Attention and head in 6 bits are calibrated, too.

    The model reads a text, or writes one itself, while the inputs of its experts are recorded. Then
    each expert is read from the checkpoint again, and rounded for the least error with these
    inputs. A fifth of the text is held out, and a matrix changes only if its error is less there.
    If a download with --keep-source kept the checkpoint, it is not fetched again.

    How long it takes is said beforehand. The length of the text follows from the model's shape and
    from the free disk, memory and time, unless --windows sets it. For Mixtral, 64 windows take 8.6
    GB of disk meanwhile and 4.6 GB of memory.

    Once the inputs are recorded, the same command resumes an interrupted calibration. The disk
    holds the model twice meanwhile, and the old one runs until the new one takes its place. A
    damaged expert of a calibrated model cannot be repaired alone.
    """
    from mixchat.install import models

    text = _text(flags)
    bits = parse_expert_bits(flags.expert_bits, flags.ctx_size)
    directory = models.installed_directory(checked(flags.model, "the model's name"), anywhere=False)
    prepare_environment()
    reporter = TerminalReporter()
    with reporter.progress() as progress:
        _calibrate(directory, text, progress, reporter, flags.windows, bits=bits)
    say(f"{flags.model} is calibrated")


def _calibrate(
    directory: Path,
    text: str | None,
    progress: Progress,
    reporter: Reporter,
    windows: int | None = None,
    *,
    bits: ExpertSize | None,
) -> None:
    """Calibrate a model with `text`, or with `windows` of text that it writes."""
    from mixchat.loading.calibrate import CalibrationText, calibrate_model
    from mixchat.text.checkpoint_text import CheckpointText

    with closing(CheckpointText(directory)) as files:
        tokenizer = files.tokenizer()
        ids = None if text is None else tokenizer.encode(text)
        tokens = CalibrationText(ids, tokenizer.bos_id, windows)
    doing = "writing text" if text is None else "reading text"
    with resumable(progress):
        counts = _shown_counts(doing, progress, reporter)
        calibrate_model(directory, tokens, progress, counts, bits=bits)


@contextmanager
def _shown_counts(doing: str, progress: Progress, reporter: Reporter) -> Iterator[OnWindow]:
    """Show how many windows or layers are done, and the time left for the others."""
    start = time.monotonic()
    with ExitStack() as stack:
        update = stack.enter_context(reporter.status(doing))

        def show(done: int, total: int, line: str, unit: str = "windows") -> None:
            nonlocal update, start
            if not done:
                start = time.monotonic()
            if line:
                stack.close()  # it would write over the line
                progress.note(line)
                update = stack.enter_context(reporter.status(doing))
            if done:
                remaining_s = (time.monotonic() - start) / done * (total - done)
                work = doing if unit == "windows" else "measuring"
                update(f"{work}: {done} of {total} {unit}, {format_time(remaining_s)} left")

        yield show


def _is_calibrated(directory: Path, bits: ExpertSize | None) -> bool:
    """Return whether a model is calibrated. Raises `UsageError` if so, but in other bits."""
    from mixchat.planning.fitting import has_bits
    from mixchat.weights.format.installed_model import installed_blueprint
    from mixchat.weights.format.manifest import read_manifest

    manifest = read_manifest(directory)
    calibrated = bool(manifest.quantization["scales"] == "calibrated")
    if calibrated and bits and not has_bits(installed_blueprint(directory, manifest), bits):
        raise UsageError(
            f"the model {directory.name!r} is already installed, calibrated in other bits",
            hint=f"mixchat calibrate {directory.name} --expert-bits {bits} makes it anew.",
        )
    return calibrated


def _text(flags: CalibrateFlags) -> str | None:
    return None if flags.calibrate_text is None else read_beginning(flags.calibrate_text, note)


def _show_plan(
    request: DownloadRequest, progress: Progress, as_json: bool, remade: ExpertSize | None
) -> None:
    from mixchat.install.make.download import plan_download

    plan = plan_download(request, progress)
    ref = request.ref
    if plan is not None:
        _report(plan, request, remade).show(as_json)
        plan.check()
    elif as_json:
        show(json.dumps({"name": ref.key, "path": str(ref.directory)}, indent=2))
    else:
        show_lines(f"{ref.key} is already installed")


def _report(
    plan: DownloadPlan, request: DownloadRequest, remade: ExpertSize | None
) -> DownloadReport:
    from mixchat.cli.output.reports import DownloadReport
    from mixchat.loading.calibrate import forecast

    return DownloadReport(plan, remade and forecast(plan, remade, again=not request.keep_source))


def _download(
    request: DownloadRequest, progress: Progress, remade: ExpertSize | None
) -> dict[str, Any]:
    """Download the model, and return its plan as JSON."""
    from mixchat.install.make.download import download as download_model

    announced: dict[str, Any] = {}

    def announce(plan: DownloadPlan) -> None:
        report = _report(plan, request, remade)
        announced.update(report.as_json())
        progress.note(report.as_text())

    with resumable(progress):
        directory = download_model(request, progress, announce=announce)
    return {**announced, "name": request.ref.key, "path": str(directory)}
