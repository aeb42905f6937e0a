"""`mixchat bench`: a model's speed beside this machine's limits, and beside llama.cpp."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixchat.chat.printing import say, show, show_lines
from mixchat.cli.flags import model_flags
from mixchat.cli.flags.arguments import checked
from mixchat.cli.flags.shell_completion import runnable_models
from mixchat.cli.output.png import PNG_HELP, checked_picture
from mixchat.cli.output.show_progress import status
from mixchat.engine.environment import prepare_environment
from mixchat.errors import UsageError

if TYPE_CHECKING:
    from mixchat.bench.peer import Peer
    from mixchat.bench.rounds import Bench, Tasks
    from mixchat.loading.loader import LoadOptions
    from mixchat.output_file import OutputFile

_SPARE = 64  # tokens of the context that measuring needs beside those that are asked for


def bench(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            autocompletion=runnable_models,
            help="A kept model, as for 'mixchat run -m'.",
        ),
    ] = None,
    synthetic: Annotated[
        int | None,
        typer.Option(
            metavar="LAYERS",
            min=1,
            max=32,
            help="Made-up layers of Mixtral's shapes, 0.83 GB each, for as long as it takes.",
        ),
    ] = None,
    context: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N", min=0, help="Decode behind N tokens; may be given again.", show_default="0"
        ),
    ] = None,
    prompt: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N", min=1, help="A prompt of N tokens; may be given again.", show_default="512"
        ),
    ] = None,
    tokens: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tokens that are decoded each time.")
    ] = 48,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="How often all is measured.")] = 5,
    kv_bits: model_flags.KVBits = None,
    exact_prompts: model_flags.ExactPrompts = False,
    host_memory: model_flags.HostMemory = None,
    device_memory: model_flags.DeviceMemory = None,
    device: model_flags.Device = None,
    peer: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Measure llama.cpp side by side, in Q4_0."),
    ] = None,
    peer_python: Annotated[
        str | None,
        typer.Option(
            metavar="PYTHON", help="A Python with llama-cpp-python.", show_default="this one"
        ),
    ] = None,
    peer_model: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The GGUF file of MODEL that llama.cpp runs."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
    png: Annotated[Path | None, typer.Option("--png", metavar="FILE", help=PNG_HELP)] = None,
) -> None:
    """Measure a model's speed beside the limits of this machine."""
    if (model is None) == (synthetic is None):
        raise UsageError("give a MODEL, or --synthetic LAYERS")
    if peer not in (None, "llama.cpp"):
        raise UsageError(f"--peer has to be llama.cpp, not {peer!r}")
    if peer and model and peer_model is None:
        raise UsageError("--peer needs --peer-model FILE.gguf, the same model for llama.cpp")
    drawing = checked_picture(png)
    budgets = model_flags.budget(host_memory), model_flags.budget(device_memory)
    bits = model_flags.checked_bits(kv_bits)
    prepare_environment()
    from mixchat.bench.rounds import Tasks
    from mixchat.loading.loader import LoadOptions

    tasks = Tasks(context or (0,), prompt or (512,), tokens, rounds)
    longest = max([n + tokens for n in tasks.contexts] + list(tasks.prompts)) + _SPARE
    load = LoadOptions(
        *budgets,
        context_size=longest,
        kv_bits=bits,
        exact_prompts=exact_prompts,
        device=device,
    )
    with ExitStack() as stack:
        directory, layers = stack.enter_context(_model(model, synthetic))
        other = None
        if peer:
            found = _peer(peer_python, peer_model, layers, longest)
            other = stack.enter_context(found)
        done = _measured(directory, load, tasks, other)
        _show(done, as_json, drawing)


@contextmanager
def _model(name: str | None, layers: int | None) -> Iterator[tuple[Path, int | None]]:
    """The model's directory, for as long as it is needed."""
    from mixchat.weights import models

    if layers is None:
        yield models.find(checked(name or "", "the model's name")), None
        return
    from mixchat.bench.synthetic import write_synthetic

    with _temporary_directory() as temporary:
        directory = temporary / "synthetic"
        with status(f"making up {layers} layers"):
            write_synthetic(directory, layers)
        yield directory, layers


@contextmanager
def _peer(
    python: str | None, model: Path | None, layers: int | None, context: int
) -> Iterator[Peer]:
    from mixchat.bench import peer

    python = python or peer.this_python()
    peer.require(python)
    with ExitStack() as stack:
        if model is None:
            assert layers is not None
            model = stack.enter_context(_temporary_directory()) / "synthetic.gguf"
            with status("making up the same for llama.cpp"):
                peer.write_model(python, model, layers)
        with status("llama.cpp loads"), peer.Peer(python, model, context) as running:
            yield running


@contextmanager
def _temporary_directory() -> Iterator[Path]:
    """A directory beside the models, where there is room for such, and a disk to be measured."""
    from mixchat.weights import models

    place = models.models_dir()
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place, prefix=".bench-") as temporary:
        yield Path(temporary)


def _measured(directory: Path, load: LoadOptions, tasks: Tasks, peer: Peer | None) -> Bench:
    from mixchat.bench.rounds import Bench
    from mixchat.planning.thread_count import settle_threads

    bench = Bench(directory, load, tasks)
    settle_threads(bench.blueprint)
    with status("the first token, from disk"):
        bench.start_cold()
    steps = tasks.rounds * len(bench.rows)
    with status(f"measuring {steps} times") as update:
        for number, _ in enumerate(bench.run(peer), 1):
            update(f"{number} of {steps} measured")
    return bench


def _show(bench: Bench, as_json: bool, png: OutputFile | None) -> None:
    from mixchat.cli.output.bench_text import as_dict, as_text, picture
    from mixchat.cli.output.png import write_figure

    if as_json:
        show(json.dumps(as_dict(bench), indent=2))
    else:
        show_lines(as_text(bench))
    if png is not None:  # last, for it may fail
        write_figure(png, picture(bench))
        say(f"wrote {png.path}")
