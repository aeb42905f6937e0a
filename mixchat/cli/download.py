"""`mixchat download`: downloads a model and quantizes it."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixchat.base.errors import UsageError
from mixchat.chat.printing import say, show, show_lines
from mixchat.cli.calibrate import calibrate_model, read_beginning
from mixchat.cli.flags.arguments import checked
from mixchat.cli.flags.quantization import Calibrate, CalibrateText, ExpertBits, parse_dense_bits
from mixchat.cli.flags.shell_completion import one_of, runnable_models
from mixchat.cli.output.show_progress import resumable, show_progress
from mixchat.engine.environment import prepare_environment

if TYPE_CHECKING:
    from mixchat.base.progress import Progress
    from mixchat.weights.make.download import DownloadRequest
    from mixchat.weights.make.download_plan import DownloadPlan


def download(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            autocompletion=runnable_models,
            help="base, instruct, demo, ORG/NAME on the hub, or a directory with a checkpoint.",
        ),
    ],
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Install it under this name.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="REV", help="A commit, branch or tag on the hub.")
    ] = None,
    expert_bits: ExpertBits = None,
    dense_bits: Annotated[
        str | None,
        typer.Option(
            metavar="BITS",
            autocompletion=one_of("16", "8", "4"),
            help="Bits of each weight of attention and output head: 16, 8 or 4, or for each, as in "
            "attention=8,head=16.",
            show_default="8; 16 with --expert-bits 16",
        ),
    ] = None,
    calibrate: Calibrate = False,
    calibrate_text: CalibrateText = None,
    keep_source: Annotated[
        bool,
        typer.Option("--keep-source", help="Keep the fetched files in Hugging Face's cache."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and do nothing.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON on standard output, for programs.")
    ] = False,
) -> None:
    """Download a model and store it in few bits, or resume a download.

    One shard is fetched while the one before it is quantized and then deleted, so that the disk
    holds the result and two shards at most. Every file is checked against the hub's SHA-256. The
    same command resumes an interrupted download; it first checks what is there, about 1 GB a
    second. Only safetensors, JSON and tokenizer files are fetched.

    A checkpoint that bitsandbytes has quantized (NF4 or FP4) is copied without rounding again.
    Attention and head get 8 bits, at hardly any cost in quality; of Mixtral, 16 bits take 1.4 GB
    more, and 4 bits 0.7 GB less, at some cost. --expert-bits 3 (w1 and w3 in 3 bits, w2 in 4)
    makes 20.2 GB of Mixtral's experts instead of 24.0, at a cost that 'mixchat plan' names;
    --expert-bits 16 stores bf16, fp16 and fp32 unquantized. --calibrate runs 'mixchat calibrate'
    afterwards.
    """
    from mixchat.weights import models

    text = None if calibrate_text is None else read_beginning(calibrate_text)
    ref = models.resolve(checked(model, "the model's name"), key=name)
    bits = parse_dense_bits(dense_bits)
    if expert_bits == "16" and not set(bits) <= {None, 16}:
        raise UsageError("--expert-bits 16 leaves the attention and the head unquantized, too")
    prepare_environment()
    from mixchat.weights.make.download import DownloadRequest
    from mixchat.weights.make.quantize_options import QuantizeOptions
    from mixchat.weights.matrix.linear import type_of_bits

    options = QuantizeOptions(type_of_bits(int(expert_bits or 4)), *bits)
    if revision is not None:
        checked(revision, "--revision")
    request = DownloadRequest(ref, options, revision, keep_source, check=check_text)
    with show_progress() as progress:
        if dry_run:
            _show_plan(request, progress, as_json)
            return
        done = _download(request, progress)
        if calibrate or calibrate_text is not None:
            with resumable(progress):
                _calibrate(ref.directory, text, progress)
    if as_json:
        show(json.dumps(done, indent=2))
    say(f"{ref.key} is ready in {done['path']}")


def _calibrate(directory: Path, text: str | None, progress: Progress) -> None:
    """Calibrate the model, or what is left of it, unless it is calibrated already."""
    from mixchat.weights.format.manifest import INPUTS_DIR, read_manifest

    calibrated = read_manifest(directory).quantization["scales"] == "calibrated"
    if not calibrated or (directory / INPUTS_DIR).exists():
        calibrate_model(directory, text, progress)


def check_text(checkpoint: Path) -> None:
    """Raise where a checkpoint's tokenizer or template cannot be used."""
    from mixchat.text.checkpoint_text import CheckpointText

    with closing(CheckpointText(checkpoint)) as text:
        text.template()


def _show_plan(request: DownloadRequest, progress: Progress, as_json: bool) -> None:
    from mixchat.cli.output.download_text import download_as_dict, download_as_text
    from mixchat.weights.make.download import plan_download

    plan, ref = plan_download(request, progress), request.ref
    if as_json:
        installed = {"name": ref.key, "path": str(ref.directory)}
        show(json.dumps(installed if plan is None else download_as_dict(plan), indent=2))
    else:
        show_lines(f"{ref.key} is already installed" if plan is None else download_as_text(plan))
    if plan is not None:
        plan.check()


def _download(request: DownloadRequest, progress: Progress) -> dict[str, Any]:
    """Download the model; return the plan as JSON has it, or name and path if it was installed."""
    from mixchat.cli.output.download_text import download_as_dict, download_as_text
    from mixchat.weights.make.download import download as download_model

    announced: dict[str, Any] = {}

    def announce(plan: DownloadPlan) -> None:
        announced.update(download_as_dict(plan))
        progress.note(download_as_text(plan))

    with resumable(progress):
        directory = download_model(request, progress, announce=announce)
    return {**announced, "name": request.ref.key, "path": str(directory)}
