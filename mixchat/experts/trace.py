"""Records what experts are given, and writes the routing as a trace.

A trace is JSON Lines. The first line is an object:

    {"format": "mixchat-trace", "version": 1, "model": "instruct", "layers": 32, "experts": 8,
     "experts_per_token": 2}

Each other line is a forward pass of T tokens: a list of `layers` lists, each with the experts of
all tokens in order, T * experts_per_token numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from mixchat.base.errors import ResourceError
from mixchat.base.output_file import OutputFile

if TYPE_CHECKING:
    import torch

    from mixchat.experts.cache import ExpertKey
    from mixchat.experts.holder import ExpertRunner, LayerExperts

    # Takes a layer, its rows [T, D], and the experts [T, K] selected for them.
    Record = Callable[[int, torch.Tensor, torch.Tensor], object]

FORMAT, VERSION = "mixchat-trace", 1
_BEGINNING = f'{{"format":"{FORMAT}"'.encode()
_COUNTS = ("layers", "experts", "experts_per_token")


def trace_file(path: Path) -> OutputFile:
    """Return the output to a file, pipe or device. Of files only an earlier trace is replaced."""
    return OutputFile("--trace", path, lambda head: head.startswith(_BEGINNING))


class TraceWriter:
    """Writes a trace to a `trace_file`, a line for each forward pass as it ends.

    Raises `UsageError` if the file cannot be created, and `ResourceError` once if writing fails.
    """

    def __init__(
        self, path: Path, model: str, layers: int, experts: int, experts_per_token: int
    ) -> None:
        self._output, self._layers = trace_file(path), layers
        self._forward: list[list[int]] = []
        # Without a buffer a crash loses no line, and closing writes nothing that could fail.
        self._file: BinaryIO | None = self._output.open()
        counts = dict(zip(_COUNTS, (layers, experts, experts_per_token), strict=True))
        header = {"format": FORMAT, "version": VERSION, "model": model} | counts
        try:
            self._output.write_first(self._file, _line(header))
        except BaseException:
            self.close()
            raise

    def record(
        self, layer: int, hidden_states: torch.Tensor, selected_experts: torch.Tensor
    ) -> None:
        """Record a layer for a `RecordingRunner`."""
        self.add(layer, selected_experts.flatten().tolist())

    def add(self, layer: int, selected: list[int]) -> None:
        """Record a layer's experts. Layer 0 starts a pass. An interrupted one leaves no line."""
        if layer == 0:
            self._forward = []
        if layer != len(self._forward):
            return
        self._forward.append(selected)
        if len(self._forward) < self._layers or self._file is None:
            return
        line = _line(self._forward)
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            self.close()
            raise ResourceError(f"{self._output}: cannot be written ({error.strerror})") from None

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()


def _line(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


class RecordingRunner:
    """Lets another `ExpertRunner` compute, and records its input."""

    def __init__(self, runner: ExpertRunner, record: Record) -> None:
        self._runner, self._record = runner, record

    def run(
        self,
        layer: int,
        hidden_states: torch.Tensor,
        selected_experts: torch.Tensor,
        routing_weights: torch.Tensor,
        *,
        exact: bool = False,
    ) -> torch.Tensor:
        result = self._runner.run(
            layer, hidden_states, selected_experts, routing_weights, exact=exact
        )
        self._record(layer, hidden_states, selected_experts)
        return result

    def resident(self, layers: Sequence[Sequence[ExpertKey]]) -> Sequence[LayerExperts]:
        """Return none, because only `run` records."""
        return ()

    def note_hits(self, layer: int, selected: Sequence[Sequence[int]]) -> None:
        """Do nothing, because `resident` returns none."""
