"""Calibrates an installed model: its experts are made anew from the checkpoint, for their inputs.

First the model reads or writes some text, and the inputs of its experts are recorded beside it.
Then each expert is read from the checkpoint again, and its scales are chosen for these inputs.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from mixchat import machine
from mixchat.engine.generate import Engine
from mixchat.errors import CheckpointError, ResourceError, UsageError
from mixchat.experts.recording import RecordingRunner
from mixchat.loading.loader import load_engine
from mixchat.model_config import ModelConfig
from mixchat.options import LoadOptions, SamplingOptions
from mixchat.progress import Note, Progress
from mixchat.quantities import format_least, format_size
from mixchat.weights.care.recalibration import Recalibration
from mixchat.weights.format.blueprint import SHARED_FILE
from mixchat.weights.format.manifest import INPUTS_DIR, read_manifest
from mixchat.weights.make.calibrator import Calibrator
from mixchat.weights.make.expert_inputs import ExpertInputs, InputsWriter, inputs_size
from mixchat.weights.source.checkpoint import CheckpointReader
from mixchat.weights.source.open_checkpoint import open_checkpoint

WINDOW = 512  # tokens that are read or written in one piece
WINDOWS = 32

OnWindow = Callable[[int, int], object]  # is called with the windows done, and their total


class Text(NamedTuple):
    """The tokens that the model reads, in windows; without them it writes as many by chance.

    first: the token that begins each window, if the model has one. It can read `WINDOWS` windows.
    """

    ids: Sequence[int] | None
    first: int | None


@contextmanager
def calibration(
    directory: Path,
    text: Text,
    progress: Progress,
    on_window: OnWindow,
    *,
    force: bool = False,
) -> Iterator[Recalibration]:
    """Record the inputs of a model's experts, and yield what makes an expert for them.

    If a calibration was interrupted, its inputs are used again for the layers that are left; they
    are removed once the block has ended well. The checkpoint has to be the one that the model was
    made of: `force` as in `Recalibration`. Raises what `record_inputs` and opening the checkpoint
    raise.
    """
    manifest, path = read_manifest(directory), directory / INPUTS_DIR
    config = ModelConfig.from_file(directory / "config.json")
    _check_memory(config)
    with (
        open_checkpoint(manifest.source, directory, progress) as checkpoint,
        CheckpointReader(checkpoint, manifest.checkpoint) as reader,
    ):
        inputs = ExpertInputs(path, config)
        make = Calibrator(inputs, checkpoint.index, reader.read).make
        remake = Recalibration(directory, checkpoint, reader, inputs, make, force)
        if path.exists():
            progress.note("resuming an interrupted calibration, with the inputs that it recorded")
        else:
            remake.check_first(progress.note)
            record_inputs(directory, path, text, on_window, progress.note)
        yield remake
    shutil.rmtree(path)


def record_inputs(
    directory: Path, target: Path, text: Text, on_window: OnWindow, note: Note = lambda text: None
) -> None:
    """Record in `target` the inputs of an installed model's experts.

    `note` is called with the disk that the calibration takes. Raises `UsageError` where the text is
    shorter than a window, `ResourceError` where the disk is too full, and what loading raises.
    """
    windows = _windows(text)
    config = ModelConfig.from_file(directory / "config.json")
    _check_disk(directory, inputs_size(config, len(windows) * WINDOW), note)
    with InputsWriter(target) as writer:
        engine = load_engine(
            directory,
            LoadOptions(context_size=WINDOW + 1),
            wrap=lambda runner: RecordingRunner(runner, writer.add),
        )
        for number, window in enumerate(windows):
            on_window(number, len(windows))
            _run(engine, window, number)


def _windows(text: Text) -> Sequence[Sequence[int]]:
    """Return the tokens of each window to read, or the first one where the model writes."""
    start = [] if text.first is None else [text.first]
    if text.ids is None:
        if not start:
            raise CheckpointError(
                "this model's tokenizer has no token to begin with",
                hint="Let the model read a text: mixchat calibrate MODEL --calibrate-text FILE.",
            )
        return [start] * WINDOWS
    ids, room = text.ids, WINDOW - len(start)
    pieces = [[*start, *ids[n : n + room]] for n in range(0, len(ids) - room + 1, room)]
    if not pieces:
        raise UsageError(f"the text has {len(ids)} tokens: a calibration needs at least {room}")
    return pieces[:WINDOWS]


def _run(engine: Engine, window: Sequence[int], seed: int) -> None:
    """Read a window, or write the rest of one that has a beginning."""
    engine.forget()
    sampling = SamplingOptions(temperature=1.0, seed=seed)
    most = WINDOW - len(window) + 1  # the last one is sampled, but not computed
    for _ in engine.generate(window, sampling=sampling, stop_ids=frozenset(), max_tokens=most):
        pass


def _check_memory(config: ModelConfig) -> None:
    """Raise `ResourceError` where the memory does not suffice to round an expert's w2."""
    width, inner = config.hidden_size, config.intermediate_size
    needed = 4 * 4 * max(width, inner) ** 2 + 8 * width * inner  # four matrices of the inputs
    if needed > (free := machine.free_memory()):
        raise ResourceError(
            f"not enough memory: {format_least(needed)} needed to calibrate an expert, "
            f"{format_size(free)} free",
            hint="Close other programs.",
        )


def _check_disk(directory: Path, inputs: int, note: Note) -> None:
    """Say what the inputs and a second copy of one layer take. Raises `ResourceError`."""
    weights = read_manifest(directory).weights
    layer = max(record.size for name, record in weights.items() if name != SHARED_FILE)
    needed, free = inputs + layer, machine.free_disk(directory)
    disk = f"{format_least(needed)} of disk in {directory}, {format_size(free)} free"
    if needed > free:
        raise ResourceError(
            f"not enough disk: a calibration takes {disk}",
            hint=f"Free some space: {format_least(inputs)} are for the inputs of experts.",
        )
    note(f"the calibration takes {disk}")
