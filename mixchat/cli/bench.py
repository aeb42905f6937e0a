"""`mixchat bench`: a model's speed against this machine's limits."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import typer

from mixchat.base.errors import UsageError
from mixchat.base.options import ExpertSize, LoadOptions
from mixchat.base.system import process_seconds
from mixchat.cli.flags import load_flags
from mixchat.cli.flags.settings import AGAIN, MEASURING, is_given, loading, option
from mixchat.cli.flags.shell_completion import known_shapes, one_of
from mixchat.cli.output.messages import note
from mixchat.cli.output.progress import status
from mixchat.engine.environment import prepare_environment


@dataclass(frozen=True, kw_only=True)
class BenchFlags:
    """The flags of `mixchat bench`."""

    model: str | None = load_flags.model_argument(load_flags.INSTALLED.help)
    synthetic: int | None = option(
        "--synthetic LAYERS",
        "Measure LAYERS layers with random weights, of 0.79 GB each in Mixtral's shapes.",
        MEASURING,
        min=1,
    )
    shape: str = option(
        "--shape NAME",
        "Known model whose shapes --synthetic takes.",
        MEASURING,
        "instruct",
        autocompletion=known_shapes,
    )
    expert_bits: str | None = option(
        "--expert-bits BITS",
        "Bits of an expert's weight with --synthetic, as for 'mixchat download'.",
        MEASURING,
        show_default="4",
        autocompletion=one_of(*load_flags.EXPERT_BITS),
    )
    dense_bits: Literal["16", "8", "6", "4"] | None = option(
        "--dense-bits BITS",
        "Bits of a weight of attention and head with --synthetic (16, 8, 6, 4).",
        MEASURING,
        show_default=load_flags.DEFAULT_DENSE_BITS,
    )
    depth: list[int] | None = option(
        "--depth N",
        f"Measure decoding after N tokens of context; {AGAIN}.",
        MEASURING,
        min=0,
        show_default="0",
    )
    prompt: list[int] | None = option(
        "--prompt N",
        f"Measure a prompt of N tokens; {AGAIN}.",
        MEASURING,
        min=1,
        show_default="512",
    )
    tokens: int = option("--tokens N", "Tokens to decode each time.", MEASURING, 48, min=1)
    rounds: int = option(
        "--rounds N", "Rounds, in each of which every task is measured.", MEASURING, 5, min=1
    )
    load: Mapping[str, Any] = loading(*load_flags.LOADING, "exact_prompts")
    as_json: bool = load_flags.JSON


def bench(context: typer.Context, flags: BenchFlags) -> None:
    """Measure a model's speed against the limits of this machine.

    --synthetic LAYERS measures without a download.
    """
    _check(context, flags)
    expert_bits = load_flags.parse_expert_bits(flags.expert_bits) or ExpertSize(4.0)
    dense_bits = None if flags.dense_bits is None else int(flags.dense_bits)
    prepare_environment()
    from mixchat.bench.rounds import Bench, BenchOptions
    from mixchat.bench.synthetic import synthetic_model
    from mixchat.cli.output.bench_report import BenchReport
    from mixchat.install import models
    from mixchat.planning.torch_threads import choose_threads

    starting = process_seconds()
    options = BenchOptions(flags.depth or (0,), flags.prompt or (512,), flags.tokens, flags.rounds)
    load = LoadOptions(context_size=options.context_size, **flags.load)
    with ExitStack() as at_end:
        if flags.synthetic is None:
            directory = models.installed_directory(flags.model or models.default_model(""))
        else:
            with status(f"writing {flags.synthetic} layers of random weights"):
                model = synthetic_model(flags.synthetic, expert_bits, flags.shape, dense_bits)
                directory = at_end.enter_context(model)
        measured = Bench(directory, load, options, note)
        choose_threads(measured.blueprint)
        with status("the first token, from disk"):
            measured.start_cold(starting)
        steps = flags.rounds * len(measured.tasks)
        with status(f"measuring {steps} times") as update:
            for number, _ in enumerate(measured.run(), 1):
                update(f"{number} of {steps} measured")
        BenchReport(measured).show(flags.as_json)


def _check(context: typer.Context, flags: BenchFlags) -> None:
    """Raise `UsageError` for flags that do not go together, and for a shape that is not known."""
    from mixchat.install.known_models import KNOWN

    layers = flags.synthetic
    shape = flags.shape
    if layers is None:
        for flag, bits in ("--expert-bits", flags.expert_bits), ("--dense-bits", flags.dense_bits):
            if bits is not None:
                hint = "A model has the bits it has."
                raise UsageError(f"{flag} goes with --synthetic", hint=hint)
        if is_given(context, "shape"):
            raise UsageError("--shape goes with --synthetic")
        return
    if is_given(context, "model"):
        raise UsageError("give a MODEL or --synthetic LAYERS, not both")
    if shape not in KNOWN:
        hint = f"It is one of {', '.join(KNOWN)}."
        raise UsageError(f"--shape cannot be {shape!r:.80}", hint=hint)
    if layers > (most := KNOWN[shape].layers):
        raise UsageError(
            f"--synthetic has to be at most {most}, the layers of {shape}, not {layers}"
        )
