"""Checks a checkpoint's text for a download, and calibrates an installed model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mixchat.base.errors import UsageError
from mixchat.base.options import DenseBits, ExpertSize
from mixchat.base.progress import Progress, Reporter
from mixchat.base.quantities import format_time

if TYPE_CHECKING:
    from mixchat.loading.calibrate import OnWindow


def check_text(checkpoint: Path) -> None:
    """Raise `CheckpointError` if a checkpoint's tokenizer or template cannot be used."""
    from mixchat.text.checkpoint_text import CheckpointText

    with closing(CheckpointText(checkpoint)) as text:
        text.template()


def is_uncalibrated(directory: Path, bits: ExpertSize | None = None) -> bool:
    """Return whether a model is not calibrated, or not in all layers.

    Raises `UsageError` if it is, and has other experts than with `bits`.
    """
    from mixchat.planning.fitting import has_bits
    from mixchat.weights.format.installed_model import installed_blueprint
    from mixchat.weights.format.manifest import read_manifest
    from mixchat.weights.format.own_files import INPUTS_DIR

    manifest = read_manifest(directory)
    calibrated = manifest.quantization["scales"] == "calibrated"
    if not calibrated or (directory / INPUTS_DIR).exists():
        return True
    if bits is not None and not has_bits(installed_blueprint(directory, manifest), bits):
        raise UsageError(
            f"the model {directory.name!r} is already installed, calibrated in other bits",
            hint=f"mixchat calibrate {directory.name} --expert-bits {bits} makes it anew.",
        )
    return False


def calibrate_model(
    directory: Path,
    text: str | None,
    progress: Progress,
    reporter: Reporter,
    windows: int | None = None,
    *,
    bits: ExpertSize | None = None,
) -> None:
    """Calibrate an installed model with `text`, or with `windows` of text that it writes.

    With `bits` its experts get other types.
    """
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
            doing = "writing text" if text is None else "reading text"
            with _shown_counts(doing, progress, reporter) as on_window:
                made = calibration(directory, tokens, progress, on_window, bits=bits)
                remake = stack.enter_context(made)
            convert(directory, target, progress, remake)


@contextmanager
def _shown_counts(doing: str, progress: Progress, reporter: Reporter) -> Iterator[OnWindow]:
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
                left = (time.monotonic() - start) / done * (total - done)
                work = doing if unit == "windows" else "measuring"
                update(f"{work}: {done} of {total} {unit}, {format_time(left)} left")

        yield show
