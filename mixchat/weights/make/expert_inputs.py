"""The inputs of the experts while a model reads or writes text: what calibration learns from.

A directory has two files for each layer: `inputs-LLL`, the rows that its experts got, bf16 [N, D],
and `selected-LLL`, the experts that the router chose for each, uint8 [N, K]. They have no header:
the model's config gives D and K.

N = tokens, D = hidden_size, K = num_experts_per_tok.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch

from mixchat.base.errors import CheckpointError
from mixchat.base.files import read_bytes, rename_durably, temporary_path
from mixchat.base.model_config import ModelConfig
from mixchat.base.safetensors import tensor_bytes


class InputsWriter:
    """Writes the rows of each layer as they come: a context manager.

    The directory gets its name once all is written; one that is there already is replaced.
    """

    def __init__(self, directory: Path) -> None:
        self._directory, self._temporary = directory, temporary_path(directory)

    def add(self, layer: int, hidden_states: torch.Tensor, selected_experts: torch.Tensor) -> None:
        """Append rows [T, D] and their experts [T, K]."""
        inputs, selected = _paths(self._temporary, layer)
        for path, rows, dtype in (
            (inputs, hidden_states, torch.bfloat16),
            (selected, selected_experts, torch.uint8),
        ):
            with open(path, "ab") as file:
                file.write(tensor_bytes(rows.cpu().to(dtype)))

    def __enter__(self) -> InputsWriter:
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            for path in self._temporary.iterdir():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            shutil.rmtree(self._directory, ignore_errors=True)
            rename_durably(self._temporary, self._directory)
        else:
            shutil.rmtree(self._temporary, ignore_errors=True)


class ExpertInputs:
    """Reads what `InputsWriter` wrote; one layer at a time is in memory."""

    def __init__(self, directory: Path, config: ModelConfig) -> None:
        self._directory, self._config = directory, config
        self._layer, self._inputs, self._selected = -1, torch.empty(0), torch.empty(0)

    @property
    def layers(self) -> set[int]:
        """Return the layers whose inputs are there."""
        return {int(path.name[-3:]) for path in self._directory.glob("selected-*")}

    def remove(self, layer: int) -> None:
        """Remove the inputs of a layer."""
        inputs, selected = _paths(self._directory, layer)
        selected.unlink()  # first: `layers` goes by these files
        inputs.unlink()

    def of(self, layer: int, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rows of all tokens, bf16 [N, D], and which of them chose the expert: bool [N].

        Raises `CheckpointError` where the files are missing or damaged.
        """
        if layer != self._layer:
            self._inputs, self._selected = self._read(layer)
            self._layer = layer
        return self._inputs, (self._selected == expert).any(-1)

    def _read(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, selected = (bytearray(read_bytes(path)) for path in _paths(self._directory, layer))
        width, choices = self._config.hidden_size, self._config.num_experts_per_tok
        rows = len(selected) // choices
        if not rows or len(inputs) != 2 * rows * width:
            raise CheckpointError(f"{self._directory}: the inputs of layer {layer} are damaged")
        return (
            torch.frombuffer(inputs, dtype=torch.bfloat16).view(rows, width),
            torch.frombuffer(selected, dtype=torch.uint8)[: rows * choices].view(rows, choices),
        )


def inputs_size(config: ModelConfig, tokens: int) -> int:
    """Return the bytes that the inputs of so many tokens take on disk."""
    row = 2 * config.hidden_size + config.num_experts_per_tok
    return config.num_hidden_layers * tokens * row


def _paths(directory: Path, layer: int) -> tuple[Path, Path]:
    return directory / f"inputs-{layer:03d}", directory / f"selected-{layer:03d}"
