"""`mixchat calibrate`: rounds a model's experts for the inputs that they get."""

from __future__ import annotations

import codecs
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mixchat.base.errors import UsageError
from mixchat.base.quantities import format_time
from mixchat.chat.printing import say
from mixchat.cli.flags.arguments import checked
from mixchat.cli.flags.quantization import CalibrateText
from mixchat.cli.flags.shell_completion import runnable_models
from mixchat.cli.output.show_progress import resumable, show_progress, status
from mixchat.engine.environment import prepare_environment

if TYPE_CHECKING:
    from mixchat.base.progress import Progress

_MOST_TEXT = 2**21  # bytes that are read: more than the tokens of a calibration take


def calibrate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            autocompletion=runnable_models,
            help="A model's name; 'mixchat list' shows them.",
        ),
    ],
    text: CalibrateText = None,
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
    --keep-source' kept it), and rounded for the least error with these inputs: with weighted
    scales, and with GPTQ. Each fifth window is held out, and a matrix gets the way with the least
    error on the windows that were held out. If neither way helps, it stays as a download makes it.
    The model's size and speed stay the same.

    By default the text gives each expert two inputs for each column of its widest matrix, if the
    text has so many tokens, half of the free disk and memory holds them, and they add no more than
    two hours. How long it takes is said beforehand. At least five windows are needed. Of Mixtral,
    64 windows take 8.6 GB of disk meanwhile and 4.6 GB of memory. The same command resumes it once
    the inputs are recorded. Layers are replaced one at a time, so that the model can be used
    whenever this is interrupted. The checkpoint has to be the one that the model was made of. A
    damaged expert cannot be repaired alone afterwards.
    """
    from mixchat.weights import models

    given = None if text is None else read_beginning(text)
    directory = models.installed_directory(checked(model, "the model's name"), anywhere=False)
    prepare_environment()
    with show_progress() as progress, resumable(progress):
        calibrate_model(directory, given, progress, windows, force=force)
    say(f"{model} is calibrated")


def calibrate_model(
    directory: Path,
    text: str | None,
    progress: Progress,
    windows: int | None = None,
    *,
    force: bool = False,
) -> None:
    """Calibrate an installed model with `text`, or one that it writes, of so many windows.

    force: take a checkpoint although nothing shows that it is the one the model was made of.
    """
    from mixchat.base.options import DenseBits
    from mixchat.loading.calibrate import Text, calibration
    from mixchat.text.checkpoint_text import CheckpointText
    from mixchat.weights.care.convert import convert, find_target
    from mixchat.weights.care.housekeeping import not_in_use
    from mixchat.weights.make.download import local_errors

    with closing(CheckpointText(directory)) as files:
        tokenizer = files.tokenizer()
        ids = None if text is None else tokenizer.encode(text)
        tokens = Text(ids, tokenizer.bos_id, windows)

    with local_errors(), not_in_use(directory):
        target = find_target(directory, None, DenseBits(), calibrated=True)
        with ExitStack() as stack:
            with _shown_windows(text) as on_window:
                made = calibration(directory, tokens, progress, on_window, force=force)
                remake = stack.enter_context(made)
            convert(directory, target, progress, remake)


def read_beginning(path: Path) -> str:
    """Return the beginning of a text. Raises `UsageError` where it cannot be read as text."""
    try:
        with open(path, "rb") as file:
            data = file.read(_MOST_TEXT)
        return codecs.getincrementaldecoder("utf-8")().decode(data, len(data) < _MOST_TEXT)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not text (UTF-8)") from None


@contextmanager
def _shown_windows(text: str | None) -> Iterator[Callable[[int, int, str], None]]:
    """Show how far the model has read or written, and how long the rest takes."""
    doing = "writing" if text is None else "reading"
    start = time.monotonic()
    with ExitStack() as stack:
        update = stack.enter_context(status(f"{doing} text"))

        def show(done: int, total: int, line: str) -> None:
            nonlocal update
            if line:
                stack.close()  # it would write over the line
                say(line)
                update = stack.enter_context(status(f"{doing} text"))
            if done:
                left = (time.monotonic() - start) / done * (total - done)
                update(f"{doing} text: {done} of {total} windows, {format_time(left)} left")

        yield show
