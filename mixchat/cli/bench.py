"""`mixchat bench`: a model's speed beside the limits of this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixchat.base.errors import UsageError
from mixchat.base.options import LoadOptions
from mixchat.chat.printing import say, show, show_lines
from mixchat.cli.flags import model_flags
from mixchat.cli.flags.arguments import checked
from mixchat.cli.flags.checks import checked_bits
from mixchat.cli.flags.quantization import ExpertBits
from mixchat.cli.flags.shell_completion import runnable_models
from mixchat.cli.output.png import PNG_HELP, checked_picture
from mixchat.cli.output.show_progress import status
from mixchat.engine.environment import prepare_environment

if TYPE_CHECKING:
    from mixchat.base.output_file import OutputFile
    from mixchat.bench.rounds import Bench


def bench(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            autocompletion=runnable_models,
            help="An installed model, as for 'mixchat run -m'.",
        ),
    ] = None,
    synthetic: Annotated[
        int | None,
        typer.Option(
            metavar="LAYERS",
            min=1,
            max=32,
            help="Measure LAYERS layers of Mixtral's shapes with random weights, 0.79 GB of disk "
            "each, and delete them afterwards.",
        ),
    ] = None,
    expert_bits: ExpertBits = None,
    depth: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Measure decoding behind N tokens of context; may be given again.",
            show_default="0",
        ),
    ] = None,
    prompt: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Measure a prompt of N tokens; may be given again.",
            show_default="512",
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tokens to decode each time.")
    ] = 48,
    rounds: Annotated[
        int, typer.Option(metavar="N", min=1, help="How many times to measure each task.")
    ] = 5,
    kv_bits: model_flags.KVBits = None,
    exact_prompts: model_flags.ExactPrompts = False,
    host_memory: model_flags.HostMemory = None,
    device_memory: model_flags.DeviceMemory = None,
    device: model_flags.Device = None,
    worker: model_flags.Worker = None,
    key_file: model_flags.KeyFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
    png: Annotated[Path | None, typer.Option("--png", metavar="FILE", help=PNG_HELP)] = None,
) -> None:
    """Measure a model's speed against the limits of this machine."""
    if (model is None) == (synthetic is None):
        raise UsageError("give a MODEL, or --synthetic LAYERS")
    if expert_bits is not None and synthetic is None:
        raise UsageError("--expert-bits goes with --synthetic", hint="A model has the bits it has.")
    drawing = checked_picture(png)
    prepare_environment()
    from mixchat.bench.rounds import Bench, BenchOptions

    options = BenchOptions(depth or (0,), prompt or (512,), tokens, rounds)
    load = LoadOptions(
        host_memory=model_flags.budget(host_memory),
        device_memory=model_flags.budgets(device_memory),
        context_size=options.context_size,
        kv_bits=checked_bits(kv_bits),
        exact_prompts=exact_prompts,
        device=device,
        workers=tuple(worker or ()),
        key_file=model_flags.key_path(key_file),
    )
    with _model(model, synthetic, int(expert_bits or 4)) as directory:
        done = Bench(directory, load, options)
        _measure(done, rounds)
        _show(done, as_json, drawing)


@contextmanager
def _model(name: str | None, layers: int | None, bits: int) -> Iterator[Path]:
    """Yield the model's directory, for as long as it is needed."""
    from mixchat.weights import models

    if layers is None:
        yield models.installed_directory(checked(name or "", "the model's name"))
        return
    from mixchat.bench.synthetic import synthetic_model

    with ExitStack() as stack:
        with status(f"writing {layers} layers of random weights"):
            directory = stack.enter_context(synthetic_model(layers, bits))
        yield directory


def _measure(bench: Bench, rounds: int) -> None:
    from mixchat.planning.torch_threads import choose_threads

    choose_threads(bench.blueprint)
    with status("the first token, from disk"):
        bench.start_cold()
    steps = rounds * len(bench.tasks)
    with status(f"measuring {steps} times") as update:
        for number, _ in enumerate(bench.run(), 1):
            update(f"{number} of {steps} measured")


def _show(bench: Bench, as_json: bool, png: OutputFile | None) -> None:
    from mixchat.cli.output.bench_text import bench_as_dict, bench_as_text, bench_picture
    from mixchat.cli.output.png import write_figure

    if as_json:
        show(json.dumps(bench_as_dict(bench), indent=2))
    else:
        show_lines(bench_as_text(bench))
    if png is not None:  # last, for it may fail
        write_figure(png, bench_picture(bench))
        say(f"wrote {png.path}")
