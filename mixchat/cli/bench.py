"""`mixchat bench`: a model's speed against this machine's limits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mixchat.base.errors import UsageError
from mixchat.base.options import ExpertSize
from mixchat.chat.printing import say
from mixchat.cli.flags import load_flags
from mixchat.cli.flags.arguments import checked
from mixchat.cli.flags.settings import MEASURING, is_given
from mixchat.cli.flags.shell_completion import known_shapes, one_of, runnable_models
from mixchat.cli.output.png import PNG, checked_picture, write_figure
from mixchat.cli.output.progress import status
from mixchat.engine.environment import prepare_environment

if TYPE_CHECKING:
    from mixchat.bench.rounds import Bench


def bench(
    context: typer.Context,
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
            rich_help_panel=MEASURING,
            min=1,
            help="Measure LAYERS layers with random weights, and delete them afterwards. One takes "
            "0.79 GB of disk in Mixtral's shapes.",
        ),
    ] = None,
    shape: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            rich_help_panel=MEASURING,
            autocompletion=known_shapes,
            help="The known model whose shapes --synthetic takes: qwen3, gpt-oss, ...",
        ),
    ] = "instruct",
    expert_bits: Annotated[
        str | None,
        typer.Option(
            metavar="BITS",
            rich_help_panel=MEASURING,
            autocompletion=one_of(*load_flags.EXPERT_BITS),
            help="Bits of each weight of the experts of a synthetic model, as for 'mixchat "
            "download': 4, 2.5, 14GB, ...",
            show_default="4",
        ),
    ] = None,
    dense_bits: Annotated[
        Literal["16", "8", "6", "5", "4"] | None,
        typer.Option(
            rich_help_panel=MEASURING,
            help="Bits of each weight of attention and output head of a synthetic model.",
            show_default="8",
        ),
    ] = None,
    depth: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N",
            rich_help_panel=MEASURING,
            min=0,
            help="Measure decoding after N tokens of context; may be given again.",
            show_default="0",
        ),
    ] = None,
    prompt: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N",
            rich_help_panel=MEASURING,
            min=1,
            help="Measure a prompt of N tokens; may be given again.",
            show_default="512",
        ),
    ] = None,
    tokens: Annotated[
        int,
        typer.Option(
            metavar="N", rich_help_panel=MEASURING, min=1, help="Tokens to decode each time."
        ),
    ] = 48,
    rounds: Annotated[
        int,
        typer.Option(
            metavar="N",
            rich_help_panel=MEASURING,
            min=1,
            help="How many times to measure each task.",
        ),
    ] = 5,
    kv_bits: load_flags.KVBits = None,
    exact_prompts: load_flags.ExactPrompts = False,
    host_memory: load_flags.HostMemory = None,
    device_memory: load_flags.DeviceMemory = None,
    device: load_flags.Device = None,
    worker: load_flags.Worker = None,
    key_file: load_flags.KeyFile = None,
    as_json: load_flags.AsJson = False,
    png: PNG = None,
) -> None:
    """Measure a model's speed against the limits of this machine."""
    if (model is None) == (synthetic is None):
        raise UsageError("give a MODEL, or --synthetic LAYERS")
    for flag, bits in (("--expert-bits", expert_bits), ("--dense-bits", dense_bits)):
        if bits is not None and synthetic is None:
            raise UsageError(f"{flag} goes with --synthetic", hint="A model has the bits it has.")
    if is_given(context, "shape") and synthetic is None:
        raise UsageError("--shape goes with --synthetic")
    size = load_flags.parse_expert_bits(expert_bits) or ExpertSize(4.0)
    picture = checked_picture(png)
    if synthetic is not None:
        _check_shape(shape, synthetic)
    prepare_environment()
    from mixchat.bench.rounds import Bench, BenchOptions
    from mixchat.cli.output.bench_report import BenchReport

    options = BenchOptions(depth or (0,), prompt or (512,), tokens, rounds)
    load = load_flags.load_options(context.params, context_size=options.context_size)
    form = size, shape, int(dense_bits or 8)
    with _model(model, synthetic, *form) as directory:
        done = Bench(directory, load, options)
        _measure(done, rounds)
        report = BenchReport(done)
        report.show(as_json)
        if picture is not None:  # last, for it may fail
            write_figure(picture, report.picture())
            say(f"wrote {picture.path}")


def _check_shape(shape: str, layers: int) -> None:
    from mixchat.weights.known_models import KNOWN

    if shape not in KNOWN:
        raise UsageError(
            f"--shape cannot be {shape!r:.80}", hint=f"It is one of {', '.join(KNOWN)}."
        )
    if layers > (most := KNOWN[shape].config["num_hidden_layers"]):
        raise UsageError(
            f"--synthetic has to be at most {most}, the layers of {shape}, not {layers}"
        )


@contextmanager
def _model(
    name: str | None, layers: int | None, expert_bits: ExpertSize, shape: str, dense_bits: int
) -> Iterator[Path]:
    """Yield the model's directory. A synthetic model is deleted at the end."""
    from mixchat.weights import models

    if layers is None:
        yield models.installed_directory(checked(name or "", "the model's name"))
        return
    from mixchat.bench.synthetic import synthetic_model

    with ExitStack() as stack:
        with status(f"writing {layers} layers of random weights"):
            made = synthetic_model(layers, expert_bits, shape, dense_bits)
            directory = stack.enter_context(made)
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
