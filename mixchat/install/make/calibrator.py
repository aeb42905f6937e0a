"""Records the inputs of matrices, and quantizes the matrices again for these inputs.

Each layer has two files. `inputs-LLL` has the rows that its experts got, bf16 [N, D], and
`selected-LLL` the experts that the router chose for each, int16 [N, K]. If attention or head have a
type that is calibrated, `dense-NAME` has the inputs of the matrix of that name, bf16 [n, C], for
the first tokens. `mix.json` has the types that experts get, if these change. `text.json` has the
tokens of one window.

An expert is fitted to the rows of the tokens that chose it, and to a few others. Each fifth window
of the text is held out, and the error there decides (`encode.py`). Neighbouring tokens are alike,
so whole windows are held out.

N = tokens, D = hidden_size, F = intermediate_size, K = num_experts_per_tok.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from mixchat.base.errors import CheckpointError
from mixchat.base.files import (
    open_regular,
    read_json_object,
    reading,
    rename_durably,
    temporary_path,
    write_file,
)
from mixchat.base.model_config import ModelConfig
from mixchat.base.safetensors import tensor_bytes
from mixchat.install.make.parts import ModelPart, model_parts
from mixchat.install.source.checkpoint import Checkpoint, CheckpointReader, other_checkpoint
from mixchat.install.source.checkpoint_index import CONFIG
from mixchat.weights.format.blueprint import Blueprint, Form
from mixchat.weights.format.expert import swiglu_of
from mixchat.weights.format.manifest import Manifest
from mixchat.weights.matrix.linear import TYPES, BiasedLinear, LinearSpec
from mixchat.weights.matrix.quant_type import Inputs, Way, dense_linear

FOLD = 5  # windows, of which the last is held out
_ROWS_OF_ALL = 32  # for each expert, whatever their tokens chose
HELD_OUT_MAX = 1024  # rows of an expert; more take time and change no decision
_MIX = "mix.json"
_TEXT = "text.json"
_DENSE = "dense-{}"  # a file of inputs of attention or head, by the matrix's name


class Mix(NamedTuple):
    """The types that each layer's experts get, and the `--expert-bits` that asked for them."""

    request: str
    forms: list[Form]


class InputsWriter:
    """A context manager that writes the rows of each layer as they come.

    dense_rows: how many each matrix of attention and head gets.
    """

    def __init__(self, directory: Path, dense_rows: int = 0) -> None:
        self._directory = directory
        self._temporary = temporary_path(directory)
        self._dense_rows = dense_rows
        self._written = Counter[str]()

    def add(self, layer: int, hidden_states: torch.Tensor, selected_experts: torch.Tensor) -> None:
        """Append rows [T, D] and their experts [T, K]."""
        inputs, selected = _paths(self._temporary, layer)
        _append(inputs, hidden_states.cpu().to(torch.bfloat16))
        _append(selected, selected_experts.cpu().to(torch.int16))

    def add_dense(self, name: str, rows: torch.Tensor) -> None:
        """Append inputs [T, C] of a matrix of attention or head until it has enough."""
        some = rows[: self._dense_rows - self._written[name]]
        self._written[name] += len(some)
        if len(some):
            _append(_dense_path(self._temporary, name), some.cpu().to(torch.bfloat16))

    def add_text(self, ids: Sequence[int]) -> None:
        """Write the tokens of a window."""
        (self._temporary / _TEXT).write_text(json.dumps({"ids": list(ids)}))

    def __enter__(self) -> InputsWriter:
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir(parents=True)
        return self

    def __exit__(self, error_type: object, *_: object) -> None:
        if error_type is None:
            for path in self._temporary.iterdir():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            shutil.rmtree(self._directory, ignore_errors=True)
            rename_durably(self._temporary, self._directory)
        else:
            shutil.rmtree(self._temporary, ignore_errors=True)


class ExpertInputs:
    """Reads the files of `InputsWriter`. One layer at a time is in memory."""

    def __init__(self, directory: Path, config: ModelConfig) -> None:
        self._directory = directory
        self._config = config
        self._layer = -1
        self._inputs = torch.empty(0)
        self._selected = torch.empty(0)

    @property
    def text(self) -> list[int]:
        """Return the tokens of a window. Raises `CheckpointError`."""
        path = self._directory / _TEXT
        ids = read_json_object(path).get("ids")
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise CheckpointError(f"{path}: damaged")
        return ids

    @property
    def mix(self) -> Mix | None:
        """Return what `write_mix` wrote, None if no type changes. Raises `CheckpointError`."""
        path = self._directory / _MIX
        if not path.exists():
            return None
        raw = read_json_object(path)
        with suppress(KeyError, TypeError, ValueError):
            mix = Mix(str(raw["request"]), [(up, down) for up, down in raw["forms"]])
            kinds = {quant_type for form in mix.forms for quant_type in form}
            if len(mix.forms) == self._config.num_moe_layers and kinds <= {None, *TYPES}:
                return mix
        raise CheckpointError(f"{path}: damaged")

    def write_mix(self, mix: Mix) -> None:
        """Save the types of each layer's experts, for a resumed calibration."""
        write_file(self._directory / _MIX, json.dumps(mix._asdict()).encode())

    def dense(self, linear: LinearSpec) -> torch.Tensor:
        """Return the rows of a matrix of attention or head, bf16 [n, C].

        Raises `CheckpointError`.
        """
        data = _read(_dense_path(self._directory, linear.name))
        if not data or len(data) % (2 * linear.columns):
            raise CheckpointError(f"{self._directory}: the inputs of {linear.name} are damaged")
        return torch.frombuffer(data, dtype=torch.bfloat16).view(-1, linear.columns)

    def of(self, layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows of all tokens, bf16 [N, D], and a mask of those that chose the expert.

        Raises `CheckpointError`.
        """
        if layer != self._layer:
            self._inputs, self._selected = self._read(layer)
            self._layer = layer
        return self._inputs, (self._selected == expert).any(-1)

    def _read(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, selected = map(_read, _paths(self._directory, layer))
        width = self._config.hidden_size
        choices = self._config.num_experts_per_tok
        rows = len(selected) // (2 * choices)
        if not rows or len(inputs) != 2 * rows * width:
            raise CheckpointError(f"{self._directory}: the inputs of layer {layer} are damaged")
        return (
            torch.frombuffer(inputs, dtype=torch.bfloat16).view(rows, width),
            torch.frombuffer(selected, dtype=torch.int16)[: rows * choices].view(rows, choices),
        )


class Calibrator:
    """Quantizes matrices of the checkpoint again. An expert's w2 comes after its w13.

    w2 is fitted to the inputs that the rounded w13 gives it, and makes up for their errors.
    `window` is in tokens.
    """

    def __init__(
        self, inputs: ExpertInputs, checkpoint: Checkpoint, reader: CheckpointReader, window: int
    ):
        self._inputs = inputs
        self._reader = reader
        self._index = checkpoint.index
        self._window = window
        self._w2_inputs = Inputs(torch.empty(0), torch.empty(0), self._note)
        self._ways = Counter[Way]()
        self._errors = 0.0

    @torch.inference_mode()
    def make(self, part: ModelPart) -> list[torch.Tensor]:
        assert part.linear is not None
        weight = part.dense(self._index, self._reader.read)
        bias = part.read_bias(self._index, self._reader.read)
        if part.expert is None:
            rows = self._inputs.dense(part.linear)
            last = self._held_out(rows)
            return part.encoded(weight, Inputs(rows[~last], rows[last], self._note), bias)
        if part.linear.name == "w2":
            return part.encoded(weight, self._w2_inputs, bias)
        fit, held_out = self._rows(*part.expert)
        tensors = part.encoded(weight, Inputs(fit, held_out, self._note), bias)
        rounded, exact = (
            [self._gated(matrix, bias, rows) for rows in (fit, held_out)]
            for matrix in (part.linear.dequantized(tensors), weight)
        )
        self._w2_inputs = Inputs(rounded[0], rounded[1], self._note, (exact[0], exact[1]))
        return tensors

    def _gated(
        self, w13: torch.Tensor, bias: torch.Tensor | None, rows: torch.Tensor
    ) -> torch.Tensor:
        """Return the inputs of w2 [n, F] for rows [n, D]."""
        linear = dense_linear(w13.to(rows.dtype))
        if bias is not None:
            linear = BiasedLinear(linear, bias)
        return swiglu_of(self._index.config)(linear(rows))

    def report(self) -> str:
        """Return the count of matrices made in each way, and the gain."""
        ways = self._ways
        count = max(1, self._ways.total())
        return (
            f"of {count} matrices {ways['gptq']} are rounded with error feedback (GPTQ), "
            f"{ways['weighted']} have weighted scales, {ways['plain']} are as they were; on text "
            f"that was held out, the error of their products is {1 - self._errors / count:.0%} less"
        )

    def _note(self, way: Way, error: float, plain: float) -> None:
        self._ways[way] += 1
        self._errors += (error / plain) ** 0.5 if plain else 1.0

    def _rows(self, layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows [n, D] that an expert is fitted to, and those held out."""
        every, chosen = self._inputs.of(layer, expert)
        last = self._held_out(every)
        held_out = _some(every, chosen, last)
        few = held_out[:: max(1, -(-len(held_out) // HELD_OUT_MAX))]
        return _some(every, chosen, ~last), few

    def _held_out(self, rows: torch.Tensor) -> torch.Tensor:
        """Return a mask of the rows [N, C] in each fifth window."""
        return torch.arange(len(rows)) // self._window % FOLD == FOLD - 1


def _some(every: torch.Tensor, chosen: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the rows of a mask [N] whose tokens chose an expert, and a few others."""
    numbers = mask.nonzero().squeeze(-1)
    few = numbers[:: max(1, len(numbers) // _ROWS_OF_ALL)][:_ROWS_OF_ALL]
    return torch.cat((every[mask & chosen], every[few]))


def check_checkpoint(
    manifest: Manifest, blueprint: Blueprint, checkpoint: Checkpoint, reader: CheckpointReader
) -> None:
    """Check that a model was made of this checkpoint, by one matrix of an expert.

    Raises `CheckpointError` for another checkpoint.
    """
    if checkpoint.index.config != blueprint.config:
        raise other_checkpoint(checkpoint, CONFIG, "its values differ")
    if manifest.source.commit is not None and manifest.source.commit == checkpoint.source.commit:
        return
    experts = [part for part in model_parts(blueprint) if part.expert]
    sources = {name for part in experts for name in part.components(checkpoint.index)}
    if not sources <= manifest.checkpoint.keys():
        raise other_checkpoint(checkpoint, CONFIG, "it has other tensors")
    for tensor in experts[0].components(checkpoint.index):
        reader.read(tensor)


def inputs_size(config: ModelConfig, tokens: int) -> int:
    """Return the bytes of the inputs of so many tokens on disk."""
    row = 2 * (config.hidden_size + config.num_experts_per_tok)
    return config.num_moe_layers * tokens * row


def gets_calibrated(part: ModelPart) -> bool:
    """Return whether a calibration quantizes a part again."""
    return part.expert is not None or (part.linear is not None and is_calibrated(part.linear))


def is_calibrated(linear: LinearSpec) -> bool:
    """Return whether a matrix of attention or head has a type that is calibrated."""
    return TYPES[linear.quant_type].calibrated_dense_parts


def dense_inputs_size(blueprint: Blueprint, rows: int) -> int:
    """Return the bytes of so many inputs of each calibrated matrix of attention and head."""
    specs = blueprint.shared_matrices.values()
    return sum(2 * rows * spec.columns for spec in specs if is_calibrated(spec))


def _append(path: Path, added: torch.Tensor) -> None:
    with open(path, "ab") as file:
        file.write(tensor_bytes(added))


def _read(path: Path) -> bytearray:
    """Return the bytes of a file of any size. Raises `CheckpointError`."""
    with reading(path), open(open_regular(path), "rb") as file:
        return bytearray(file.read())


def _dense_path(directory: Path, name: str) -> Path:
    return directory / _DENSE.format(name)


def _paths(directory: Path, layer: int) -> tuple[Path, Path]:
    return directory / f"inputs-{layer:03d}", directory / f"selected-{layer:03d}"
