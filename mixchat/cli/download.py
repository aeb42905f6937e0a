"""`mixchat download` and `mixchat calibrate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixchat.base.errors import UsageError
from mixchat.chat.printing import say, show, show_lines
from mixchat.cli.flags.arguments import checked, read_beginning
from mixchat.cli.flags.load_flags import (
    DENSE_BITS,
    ContextSize,
    ExpertBits,
    installed_model_argument,
    parse_dense_bits,
    parse_expert_bits,
)
from mixchat.cli.flags.shell_completion import one_of, runnable_models
from mixchat.cli.output.progress import TerminalReporter, resumable
from mixchat.engine.environment import prepare_environment
from mixchat.sessions.install import calibrate_model, check_text, is_uncalibrated

if TYPE_CHECKING:
    from mixchat.base.options import ExpertSize
    from mixchat.base.progress import Progress
    from mixchat.weights.make.download import DownloadRequest
    from mixchat.weights.make.download_plan import DownloadPlan

_CalibrateText = Annotated[
    Path | None,
    typer.Option(
        "--calibrate-text",
        metavar="FILE",
        help="Calibrate with this text, not one that the model writes.",
    ),
]


def download(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            autocompletion=runnable_models,
            help="instruct, qwen3, gpt-oss or another known one (see 'mixchat plan'), demo, "
            "ORG/NAME on the hub, ORG/NAME:Q4_K_M (in GGUF), or a checkpoint's directory or .gguf "
            "file.",
        ),
    ],
    name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Install it under this name.")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="REV", help="A commit, branch or tag on the hub.")
    ] = None,
    expert_bits: ExpertBits = None,
    ctx_size: ContextSize = None,
    dense_bits: Annotated[
        str | None,
        typer.Option(
            metavar="BITS",
            autocompletion=one_of(*DENSE_BITS),
            help="Bits of each weight of attention and output head: 16, 8, 6, 5 or 4, or for each, "
            "as in attention=8,head=6.",
            show_default="8; 16 with --expert-bits 16",
        ),
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Re-quantize the experts with GPTQ on text that the model reads, or writes.",
        ),
    ] = False,
    calibrate_text: _CalibrateText = None,
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
    """Download and quantize a model, or resume a download.

    One shard is fetched while the one before it is quantized and then deleted, so that the disk
    holds the result and two shards at most. Every file is checked against the hub's SHA-256. The
    same command resumes an interrupted download. It first checks what is there, about 1 GB a
    second. Only safetensors, GGUF, JSON and tokenizer files are fetched.

    ORG/NAME:KIND is a model in GGUF, with its tokenizer. A file of it is fetched whole before it is
    quantized to mixchat's own form, which rounds a second time. Experts in MXFP4 are copied. If a
    repository has several kinds and none is named, they are listed.

    A checkpoint that bitsandbytes has quantized (NF4 or FP4) is copied without rounding again, and
    so are experts in MXFP4, as gpt-oss is published.
    Attention and head get 8 bits, at hardly any cost in quality. Of Mixtral, 16 bits take 1.4 GB
    more, and 4 bits 0.7 GB less, at some cost. --expert-bits 3 makes 17.6 GB of Mixtral's experts
    instead of 24.0, at a cost that 'mixchat plan' names;
    --expert-bits 16 stores bf16, fp16 and fp32 unquantized. --calibrate runs 'mixchat calibrate'
    afterwards.

    Other bits, as in --expert-bits 2.4, count the scales. Layers that lose most by noise get more
    bits. A size, as in --expert-bits 14GB, is the memory for the whole model, with keys and values
    for --ctx-size and what is left free. For both, and for 2 bits, which plain rounding would ruin,
    the model is first installed in 4 bits, and then calibrated as 'mixchat calibrate --expert-bits'
    does. The plan says beforehand what that takes.
    """
    from mixchat.weights import models

    text = None if calibrate_text is None else read_beginning(calibrate_text)
    ref = models.resolve(checked(model, "the model's name"), key=name)
    bits = parse_dense_bits(dense_bits)
    wanted = parse_expert_bits(expert_bits, ctx_size)
    if expert_bits == "16" and not set(bits) <= {None, 16}:
        raise UsageError("--expert-bits 16 leaves the attention and the head unquantized, too")
    prepare_environment()
    from mixchat.weights.make.download import DownloadRequest
    from mixchat.weights.make.mix import is_for_calibration
    from mixchat.weights.make.quantize_options import QuantizeOptions
    from mixchat.weights.matrix.linear import type_of_bits

    remade = wanted if wanted is not None and is_for_calibration(wanted) else None
    whole = 4 if wanted is None or remade else wanted.whole
    options = QuantizeOptions(type_of_bits(whole or 4), *bits)
    if revision is not None:
        checked(revision, "--revision")
    request = DownloadRequest(ref, options, revision, keep_source, check_text, remade is not None)
    reporter = TerminalReporter()
    with reporter.progress() as progress:
        if dry_run:
            _show_plan(request, progress, as_json, remade)
            return
        result = _download(request, progress, remade)
        wants = calibrate or calibrate_text is not None or remade is not None
        if wants and is_uncalibrated(ref.directory, remade):
            with resumable(progress):
                calibrate_model(ref.directory, text, progress, reporter, bits=remade)
    if as_json:
        show(json.dumps(result, indent=2))
    say(f"{ref.key} is ready in {result['path']}")


def calibrate(
    model: Annotated[str, installed_model_argument("A model's name; 'mixchat list' shows them.")],
    text: _CalibrateText = None,
    expert_bits: ExpertBits = None,
    ctx_size: ContextSize = None,
    windows: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=5,
            max=512,
            help="Read or write N windows of 512 tokens.",
            show_default="by the model's shape and this machine's speed",
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Take a checkpoint although nothing shows that it is still the same."
        ),
    ] = False,
) -> None:
    """Re-quantize a model's experts with GPTQ on sample text.

    The model reads a text, or writes one itself, while the inputs of its experts are recorded. Then
    each expert is read from the checkpoint again (from the hub, unless 'mixchat download
    --keep-source' kept it), and rounded for the least error with these inputs, by weighted
    scales and by GPTQ. Each fifth window is held out, and a matrix gets the way with the least
    error on the windows that were held out. If neither way helps, it stays as a download makes it.
    The model's size and speed stay the same. Attention and head in 6 or 5 bits are rounded anew,
    too.

    By default the text gives each expert two inputs for each column of its widest matrix, if the
    text has so many tokens, half of the free disk and memory holds them, and they add no more than
    two hours. How long it takes is said beforehand. At least five windows are needed. --expert-bits
    gives the experts other types, by layer for a number such as 2.4 or a size of memory. Of Mixtral
    64 windows take 8.6 GB of disk meanwhile and 4.6 GB of memory. The same command resumes it once
    the inputs are recorded. Layers are replaced one at a time, so that the model can be used
    whenever this is interrupted. The checkpoint has to be the one that the model was made of. A
    damaged expert cannot be repaired alone afterwards.
    """
    from mixchat.weights import models

    given = None if text is None else read_beginning(text)
    bits = parse_expert_bits(expert_bits, ctx_size)
    directory = models.installed_directory(checked(model, "the model's name"), anywhere=False)
    prepare_environment()
    reporter = TerminalReporter()
    with reporter.progress() as progress, resumable(progress):
        calibrate_model(directory, given, progress, reporter, windows, bits=bits, force=force)
    say(f"{model} is calibrated")


def _show_plan(
    request: DownloadRequest, progress: Progress, as_json: bool, remade: ExpertSize | None
) -> None:
    from mixchat.cli.output.reports import DownloadReport
    from mixchat.weights.make.download import plan_download

    plan, ref = plan_download(request, progress), request.ref
    if plan is not None:
        DownloadReport(plan, _afterwards(plan, request, remade)).show(as_json)
        plan.check()
    elif as_json:
        show(json.dumps({"name": ref.key, "path": str(ref.directory)}, indent=2))
    else:
        show_lines(f"{ref.key} is already installed")


def _afterwards(
    plan: DownloadPlan, request: DownloadRequest, remade: ExpertSize | None
) -> str | None:
    from mixchat.loading.calibrate import forecast

    return remade and forecast(plan, remade, again=not request.keep_source)


def _download(
    request: DownloadRequest, progress: Progress, remade: ExpertSize | None
) -> dict[str, Any]:
    """Download the model, and return its plan as JSON."""
    from mixchat.cli.output.reports import DownloadReport
    from mixchat.weights.make.download import download as download_model

    announced: dict[str, Any] = {}

    def announce(plan: DownloadPlan) -> None:
        report = DownloadReport(plan, _afterwards(plan, request, remade))
        announced.update(report.as_json())
        progress.note(report.as_text())

    with resumable(progress):
        directory = download_model(request, progress, announce=announce)
    return {**announced, "name": request.ref.key, "path": str(directory)}
