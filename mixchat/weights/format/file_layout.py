"""The layout of a model's files of weights: the place of each tensor's bytes."""

from __future__ import annotations

from collections.abc import Sequence

from mixchat.base.safetensors import Header, TensorSpec, header_bytes
from mixchat.weights.format.blueprint import Blueprint


class FileLayout:
    """One file: its first bytes (`start`), its size, and its header with the tensors' places."""

    def __init__(self, name: str, specs: Sequence[TensorSpec]) -> None:
        self.start = header_bytes(specs)
        self.size = len(self.start) + sum(spec.nbytes for spec in specs)
        self.header = Header(self.start[8:], self.size, name)


def file_layouts(blueprint: Blueprint) -> dict[str, FileLayout]:
    """Return the layout of each file of weights of a model, by the file's name."""
    return {name: FileLayout(name, specs) for name, specs in blueprint.files().items()}
