"""Routing traces: the experts that the tokens of a run went to, recorded to a file.

A trace is JSON Lines. The first line is an object:

    {"format": "mixchat-trace", "version": 1, "model": "instruct", "layers": 32, "experts": 8,
     "experts_per_token": 2}

Each other line is one forward pass of T tokens: a list of `layers` lists, each with the selected
experts of all tokens in order, T * experts_per_token numbers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO

from mixchat.base.errors import ResourceError
from mixchat.base.output_file import OutputFile

if TYPE_CHECKING:
    import torch

FORMAT, VERSION = "mixchat-trace", 1
_BEGINNING = f'{{"format":"{FORMAT}"'.encode()
_COUNTS = ("layers", "experts", "experts_per_token")


@dataclass(frozen=True)
class Trace:
    """The routing of a run: `forwards[i][layer]` has the selected experts of that pass's tokens."""

    model: str
    layers: int
    experts: int
    experts_per_token: int
    forwards: list[list[list[int]]]

    def tokens(self, forward: list[list[int]]) -> int:
        """Return the count of tokens in a forward pass: one is decode, more are prefill."""
        return len(forward[0]) // self.experts_per_token


def trace_file(path: Path) -> OutputFile:
    """Return the output to a file, pipe or device; of files only an earlier trace is replaced."""
    return OutputFile("--trace", path, _is_ours)


def _line(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _is_ours(head: bytes) -> bool:
    return head.startswith(_BEGINNING)


class TraceWriter:
    """Writes a trace, a line for each forward pass as it ends, to a `trace_file`.

    Raises `UsageError` where the file cannot be created, and `ResourceError` once where writing
    fails: nothing is recorded after that.
    """

    def __init__(
        self, path: Path, model: str, layers: int, experts: int, experts_per_token: int
    ) -> None:
        self._output, self._layers = trace_file(path), layers
        self._forward: list[list[int]] = []
        # Without a buffer: all lines are there after a crash, and closing writes nothing, which
        # could fail again.
        self._file: BinaryIO | None = self._output.open()
        counts = dict(zip(_COUNTS, (layers, experts, experts_per_token), strict=True))
        header = {"format": FORMAT, "version": VERSION, "model": model} | counts
        try:
            self._output.write_first(self._file, _line(header))
        except BaseException:
            self.close()
            raise

    def add(self, layer: int, selected: list[int]) -> None:
        """Record the experts that a layer selected; layer 0 starts a forward pass.

        A forward pass that was interrupted leaves no line.
        """
        if layer == 0:
            self._forward = []
        if layer == len(self._forward):
            self._forward.append(selected)
            if len(self._forward) == self._layers:
                self._write(self._forward)

    def record(
        self, layer: int, hidden_states: torch.Tensor, selected_experts: torch.Tensor
    ) -> None:
        """Record them for a `RecordingRunner`."""
        self.add(layer, selected_experts.flatten().tolist())

    def close(self) -> None:
        """Close the file; later calls of `add` record nothing."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _write(self, value: object) -> None:
        if self._file is None:
            return
        rest = _line(value)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self.close()
            raise ResourceError(f"{self._output}: cannot be written ({error.strerror})") from None

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
