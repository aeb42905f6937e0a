"""Re-quantizes the experts of an installed model for their inputs.

First the model reads or writes some text, and the inputs of its experts are recorded. Then each
expert is read from the checkpoint again, and its scales are chosen for these inputs. So are
attention and head, if their type is calibrated.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from mixchat.base import machine
from mixchat.base.errors import CheckpointError, ResourceError, UsageError
from mixchat.base.model_config import ModelConfig
from mixchat.base.options import ExpertSize, LoadOptions, SamplingOptions
from mixchat.base.progress import Note, Progress
from mixchat.base.quantities import format_least, format_size, format_time
from mixchat.engine.generate import Engine
from mixchat.experts.recording_runner import RecordingRunner
from mixchat.install.care.housekeeping import not_in_use
from mixchat.install.make.calibrator import (
    FOLD,
    HELD_OUT_MAX,
    Calibrator,
    ExpertInputs,
    InputsWriter,
    Mix,
    check_checkpoint,
    dense_inputs_size,
    gets_calibrated,
    inputs_size,
    is_calibrated,
)
from mixchat.install.make.download import local_errors
from mixchat.install.make.download_plan import DownloadPlan
from mixchat.install.make.mix import (
    bits_of,
    budget_of,
    choose_mix,
    forms_of,
    mixed,
    summary,
    usual_type,
)
from mixchat.install.make.needs import SMALL_FILES_BYTES, Need
from mixchat.install.make.rebuild import Rebuild, Remake
from mixchat.install.source.checkpoint import CheckpointReader
from mixchat.install.source.open_checkpoint import open_checkpoint
from mixchat.loading.loader import load_engine
from mixchat.loading.sensitivity import measure_sensitivities
from mixchat.planning.fitting import expected_mix, expert_budget
from mixchat.weights.format.blueprint import Blueprint
from mixchat.weights.format.installed_model import installed_blueprint
from mixchat.weights.format.manifest import check_files, read_manifest
from mixchat.weights.format.workspace import INPUTS_DIR, workspace
from mixchat.weights.matrix.int6 import ROWS_AT_ONCE

WINDOW = 512  # tokens in one piece
ROWS_A_COLUMN = 2  # for each column of an expert's widest matrix, since more gain little
_DENSE_ROWS_A_COLUMN = 8  # every token is an input of attention and head
_DEFAULT_TEXT_S = 2 * 3600
_MEASURED_WINDOWS = 2  # the second one finds the kernels compiled
_MEASURED_SIZE = 1024  # rows and columns


class OnWindow(Protocol):
    """Takes the units done, their total, a line that says what comes next, and the unit's name."""

    def __call__(self, done: int, total: int, line: str, unit: str = "windows") -> object: ...


class CalibrationText(NamedTuple):
    """The tokens that the model reads, in windows. Without `ids` it writes a text.

    `first` begins each window, if the model has such a token. `windows` is None for a number that
    suits the model and the machine.
    """

    ids: Sequence[int] | None
    first: int | None
    windows: int | None = None


def calibrate_model(
    directory: Path,
    text: CalibrationText,
    progress: Progress,
    counts: AbstractContextManager[OnWindow],
    *,
    bits: ExpertSize | None = None,
) -> None:
    """Calibrate an installed model. With `bits` its experts get other types.

    `counts` shows the work that comes before the experts. The inputs and types of an interrupted
    calibration are used again. Raises `UsageError` if the model has no experts to calibrate or the
    text is too short, `ResourceError` if the disk or the memory is short, `CheckpointError` if the
    checkpoint is not the one that the model was made of.
    """
    with local_errors(), not_in_use(directory):
        manifest = read_manifest(directory)
        path = workspace(directory) / INPUTS_DIR
        check_files(directory, manifest)
        blueprint = installed_blueprint(directory, manifest)
        _check_types(directory, blueprint)
        _check_memory(blueprint, directory, 0)
        mix = blueprint if bits is None else expected_mix(blueprint, bits)
        with (
            open_checkpoint(manifest.source, directory, progress) as checkpoint,
            CheckpointReader(checkpoint, manifest.checkpoint) as reader,
        ):
            check_checkpoint(manifest, blueprint, checkpoint, reader)
            inputs = ExpertInputs(path, blueprint.config)
            with counts as on_window:
                if path.exists():
                    progress.note(
                        "resuming an interrupted calibration, with the inputs that it recorded"
                    )
                else:
                    _record_inputs(directory, mix.size, text, on_window, progress.note)
                if bits is not None:
                    _choose_types(directory, blueprint, inputs, bits, on_window, progress.note)
            calibrator = Calibrator(inputs, checkpoint, reader, WINDOW)
            forms = inputs.mix.forms if inputs.mix else forms_of(blueprint)
            whole = replace(blueprint.quantization, scales="calibrated")
            calibrated = mixed(replace(blueprint, quantization=whole), forms)
            remake = Remake(gets_calibrated, calibrator.make, uses_inputs=True)
            Rebuild(directory, calibrated, "calibrating", remake).run(progress)
            progress.note(calibrator.report())


def _check_types(directory: Path, blueprint: Blueprint) -> None:
    stored = blueprint.quantization
    if stored.quant_type == "none":
        raise UsageError(
            f"{directory.name!r} has no experts in 3 or 4 bits: there is nothing to calibrate"
        )
    if stored.scales == "given":
        raise UsageError(
            f"the experts of {directory.name!r} stay as they are: their checkpoint has them in "
            f"4 bits ({stored.quant_type}), and no 16-bit form to quantize again"
        )


def _choose_types(
    directory: Path,
    blueprint: Blueprint,
    inputs: ExpertInputs,
    bits: ExpertSize,
    on_window: OnWindow,
    note: Note,
) -> None:
    """Choose the types of experts, unless an interrupted calibration has."""
    if (mix := inputs.mix) is not None:
        if mix.request != str(bits):
            raise UsageError(
                f"an unfinished calibration of {directory.name!r} makes experts in "
                f"{mix.request} bits, not {bits}",
                hint=f"Finish it first: mixchat calibrate {directory.name} --expert-bits "
                f"{mix.request}",
            )
        return
    chosen = expected_mix(blueprint, bits)
    if usual_type(bits) is None:
        note("measuring how much each layer loses by noise, to choose its bits")
        sensitivities = measure_sensitivities(
            directory, inputs.text, lambda done, count: on_window(done, count, "", "layers")
        )
        chosen = choose_mix(blueprint, sensitivities, expert_budget(blueprint, bits))
        note(f"the experts get {bits_of(chosen):.2f} bits a weight: {summary(chosen)}")
    inputs.write_mix(Mix(str(bits), forms_of(chosen)))


def forecast(plan: DownloadPlan, bits: ExpertSize, *, again: bool) -> str:
    """Return the cost of a calibration after a download. With `again`, weights are fetched twice.

    Raises `UsageError` if the experts cannot have these bits.
    """
    blueprint = plan.blueprint
    config = plan.blueprint.config
    model = expected_mix(blueprint, bits)
    directory = machine.nearest_existing(plan.target)
    windows = default_windows(config, directory)
    text = (
        f"calibrates experts to {bits_of(model):.2f} bits, {format_size(model.size)} in all, "
        f"because rounding alone would lose more: writes at most {windows} windows of text for "
        f"at most {format_time(_DEFAULT_TEXT_S)}, and rounds for about "
        f"{format_time(_seconds_to_fit(config, windows))}, with "
        f"{format_least(_disk(blueprint, directory, windows) + model.size)} of disk meanwhile and "
        f"{format_least(_memory(blueprint, directory, windows))} of memory"
    )
    if plan.commit is not None and again:
        weights = 2 * budget_of(blueprint, 8)
        text += (
            f"; fetches the experts' weights a second time, {format_size(weights)} "
            "(--keep-source keeps them instead)"
        )
    return text


def _record_inputs(
    directory: Path, size: int, text: CalibrationText, on_window: OnWindow, note: Note
) -> None:
    """Record the inputs of a model's experts. size: the bytes of the calibrated model."""
    blueprint = installed_blueprint(directory, read_manifest(directory))
    config = blueprint.config
    dense_rows = _dense_rows(blueprint, directory)
    windows = _windows(text, text.windows or default_windows(config, directory))
    _check_memory(blueprint, directory, len(windows))
    target = workspace(directory) / INPUTS_DIR
    needed = _disk(blueprint, directory, len(windows)) + size + SMALL_FILES_BYTES
    need = Need(directory, needed, machine.free_disk(directory))
    need.check()
    note(f"calibrating takes {need}")
    with InputsWriter(target, dense_rows) as writer:
        engine = load_engine(
            directory,
            LoadOptions(context_size=WINDOW + 1),
            wrap=lambda runner: RecordingRunner(runner, writer.add),
        )
        if dense_rows:
            engine.passes.model.record_inputs(writer.add_dense)
        seconds = 0.0
        for number, window in enumerate(windows[:_MEASURED_WINDOWS]):
            on_window(number, len(windows), "")
            seconds = _run(engine, window, number)
        writer.add_text(engine.held()[0])
        windows = windows[: _affordable(config, text, len(windows), seconds)]
        line = _announcement(config, text, len(windows), seconds)
        for number, window in enumerate(windows[_MEASURED_WINDOWS:], _MEASURED_WINDOWS):
            on_window(number, len(windows), line)
            line = ""
            _run(engine, window, number)


def _dense_rows(blueprint: Blueprint, directory: Path) -> int:
    """Return how many inputs each calibrated matrix of attention and head gets, in whole windows.

    They take a quarter of the free disk at most, but there are always `FOLD` windows.
    """
    specs = [spec for spec in blueprint.shared_matrices.values() if is_calibrated(spec)]
    if not specs:
        return 0
    windows = math.ceil(_DENSE_ROWS_A_COLUMN * max(spec.columns for spec in specs) / WINDOW)
    room = machine.free_disk(directory) / 4 / dense_inputs_size(blueprint, WINDOW)
    return WINDOW * max(FOLD, min(windows, int(room)))


def default_windows(config: ModelConfig, directory: Path) -> int:
    """Return how many windows suit the shape, within half of the free disk and memory."""
    width = max(config.hidden_size, config.intermediate_size)
    tokens = ROWS_A_COLUMN * width * config.num_local_experts / config.num_experts_per_tok
    disk = machine.free_disk(directory) / 2 / inputs_size(config, WINDOW)
    memory = (machine.free_memory() / 2 - _expert_memory(config, 0)) / _memory_of_window(config)
    return max(FOLD, int(min(math.ceil(tokens / WINDOW), disk, memory)))


def _affordable(config: ModelConfig, text: CalibrationText, windows: int, seconds: float) -> int:
    if text.windows is not None:
        return windows
    each = seconds + _seconds_to_fit(config, 1) - _seconds_to_fit(config, 0)
    return max(FOLD, min(windows, int(_DEFAULT_TEXT_S / each)))


def _announcement(config: ModelConfig, text: CalibrationText, windows: int, seconds: float) -> str:
    experts = config.num_moe_layers * config.num_local_experts
    return (
        f"{'writes' if text.ids is None else 'reads'} {windows} windows of {WINDOW} tokens: about "
        f"{format_time(windows * seconds)} on this machine; then rounds {experts} experts: about "
        f"{format_time(_seconds_to_fit(config, windows))}"
    )


def _seconds_to_fit(config: ModelConfig, windows: int) -> float:
    """Estimate the seconds in which all experts are rounded.

    The operations are those of half a Hessian, its factor, two times the feedback, the fitted
    scales, the errors, and the correction of w2. C = columns, R = rows. Factoring is slower than a
    product.
    """
    rows = windows * WINDOW * config.num_experts_per_tok / config.num_local_experts
    width = config.hidden_size
    inner = config.intermediate_size
    operations = sum(
        rows * C**2 + C**3 / 2 + 6 * R * C**2 + min(2 * rows, 6 * HELD_OUT_MAX) * R * C
        for R, C in ((2 * inner, width), (width, inner))
    )
    operations += (4 * rows + 2 * inner) * width * inner
    experts = config.num_moe_layers * config.num_local_experts
    return experts * operations / _operations_a_second()


@functools.cache
def _operations_a_second() -> float:
    """Return the speed of a product in fp32, the best of three."""
    matrix = torch.ones(_MEASURED_SIZE, _MEASURED_SIZE)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        matrix @ matrix
        seconds.append(time.perf_counter() - start)
    return 2 * _MEASURED_SIZE**3 / min(seconds)


def _windows(text: CalibrationText, count: int) -> Sequence[Sequence[int]]:
    """Return the tokens of so many windows, or the first token of each if the model writes."""
    start = [] if text.first is None else [text.first]
    if text.ids is None:
        if not start:
            raise CheckpointError(
                "this model's tokenizer has no token to begin with",
                hint="Let the model read a text: mixchat calibrate MODEL --calibrate-text FILE.",
            )
        return [start] * count
    ids = text.ids
    room = WINDOW - len(start)
    least = text.windows or FOLD
    if len(ids) < least * room:
        raise UsageError(
            f"the text has {len(ids)} tokens: {least} windows need {least * room}",
            hint="Give a longer text, or none: then the model writes one.",
        )
    pieces = [[*start, *ids[n : n + room]] for n in range(0, len(ids) - room + 1, room)]
    return pieces[:count]


def _run(engine: Engine, window: Sequence[int], seed: int) -> float:
    """Return the seconds that it took to read a window, or to write it."""
    begin = time.monotonic()
    engine.forget()
    sampling = SamplingOptions(temperature=1.0, seed=seed)
    most = WINDOW - len(window) + 1  # the last token is sampled, but not computed
    for _ in engine.generate(window, sampling=sampling, stop_ids=frozenset(), max_tokens=most):
        pass
    return time.monotonic() - begin


def _check_memory(blueprint: Blueprint, directory: Path, windows: int) -> None:
    needed = _memory(blueprint, directory, windows)
    if needed > (free := machine.free_memory()):
        raise ResourceError(
            f"not enough memory: {format_least(needed)} needed to calibrate a matrix, "
            f"{format_size(free)} free",
            hint="Close other programs, or read fewer windows (--windows).",
        )


def _disk(blueprint: Blueprint, directory: Path, windows: int) -> int:
    """Return the bytes of the inputs of so many windows."""
    rows = windows * WINDOW
    dense = dense_inputs_size(blueprint, min(rows, _dense_rows(blueprint, directory)))
    return inputs_size(blueprint.config, rows) + dense


def _memory(blueprint: Blueprint, directory: Path, windows: int) -> int:
    """Return the bytes of memory for rounding any matrix, with the inputs of so many windows."""
    dense = _dense_memory(blueprint, _dense_rows(blueprint, directory))
    return max(_expert_memory(blueprint.config, windows), dense)


def _expert_memory(config: ModelConfig, windows: int) -> int:
    """Return the bytes to round an expert's w2, for three matrices of its inputs and of w2."""
    width = config.hidden_size
    inner = config.intermediate_size
    matrices = 3 * 4 * max(width, inner) ** 2 + 12 * width * inner
    return matrices + windows * _memory_of_window(config)


def _dense_memory(blueprint: Blueprint, rows: int) -> int:
    """Return the bytes to round the largest calibrated matrix of attention and head."""
    specs = [spec for spec in blueprint.shared_matrices.values() if is_calibrated(spec)]
    # The inputs twice, three matrices [C, C], six of some rows in fp32, and all rows in 16 bits and
    # as codes.
    return max(
        (
            spec.columns
            * (4 * rows + 12 * spec.columns + 24 * min(spec.rows, ROWS_AT_ONCE) + 3 * spec.rows)
            for spec in specs
        ),
        default=0,
    )


def _memory_of_window(config: ModelConfig) -> int:
    """Return the bytes of a window's inputs, of a layer and of an expert."""
    width = config.hidden_size
    inner = config.intermediate_size
    share = config.num_experts_per_tok / config.num_local_experts
    return int(2 * WINDOW * (width + share * (width + 3 * inner)))
