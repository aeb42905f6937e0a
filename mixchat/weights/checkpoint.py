"""The reader of a kept model: opens its files and rejects what is not exactly what it should be."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import torch

from mixchat.config import ModelConfig
from mixchat.errors import CheckpointError
from mixchat.weights.blueprint import SHARED_FILE, Blueprint, Quantization, experts_file
from mixchat.weights.linear import Linear, LinearSpec
from mixchat.weights.manifest import Manifest, read_manifest
from mixchat.weights.safetensors import SafetensorsFile, TensorSpec

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


class KeptModel:
    """A kept model, open for reading.

    Opening checks the manifest, each file's size, and that each header names exactly the tensors,
    types and shapes that the config asks for. Bytes are not hashed: 24 GB would take half a minute.
    Raises `CheckpointError`.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.manifest = read_manifest(directory)
        self._check_sizes()
        self.config = ModelConfig.from_file(directory / "config.json")
        self.blueprint = Blueprint(self.config, quantization_of(self.manifest))
        self._files: list[SafetensorsFile] = []
        try:
            self._shared = self._open(SHARED_FILE, self.blueprint.shared_tensors())
            self._experts = [
                self._open(experts_file(layer), self.blueprint.expert_tensors())
                for layer in range(self.config.num_hidden_layers)
            ]
            first = next(self.blueprint.expert_tensors()).name
            self._expert_base = [file.start(first) for file in self._experts]
        except BaseException:
            self.close()
            raise

    def tensor(self, spec: TensorSpec) -> torch.Tensor:
        """A shared tensor, on the CPU."""
        return self._shared.read(spec.name)

    def linear(self, spec: LinearSpec, target: LinearSpec, device: torch.device) -> Linear:
        """A shared linear map on `device`, its codes in the layout of `target`."""
        tensors = [self._shared.read(tensor.name).to(device) for tensor in spec.tensors]
        spec.convert(tensors, target)
        return target.build(tensors)

    def read_expert(self, layer: int, expert: int, block: torch.Tensor) -> None:
        """Fill `block` (uint8, `stride` bytes, on the CPU) with one expert, in one read."""
        start = self._expert_base[layer] + expert * self.blueprint.expert.stride
        self._experts[layer].read_into(block, start)

    def close(self) -> None:
        """Close all files."""
        for file in self._files:
            file.close()

    def __enter__(self) -> KeptModel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _check_sizes(self) -> None:
        for name, record in self.manifest.files.items():
            path = self.directory / name
            if not path.is_file():
                raise CheckpointError(f"{path}: the file is missing", hint=_DOWNLOAD_AGAIN)
            if (size := path.stat().st_size) != record.size:
                raise CheckpointError(
                    f"{path}: {size} bytes, but the manifest says {record.size}",
                    hint=_DOWNLOAD_AGAIN,
                )

    def _open(self, name: str, expected: Iterable[TensorSpec]) -> SafetensorsFile:
        if name not in self.manifest.files:
            raise CheckpointError(f"{self.directory}: the manifest does not list {name}")
        file = SafetensorsFile(self.directory / name)
        self._files.append(file)
        if file.specs != list(expected):
            raise CheckpointError(
                f"{file.path}: its tensors are not those of this model", hint=_DOWNLOAD_AGAIN
            )
        return file


_DOWNLOAD_AGAIN = "Remove the directory and download the model again."


def quantization_of(manifest: Manifest) -> Quantization:
    """The manifest's quantization, typed."""
    values = {key: value for key, value in manifest.quantization.items() if key != "blocksize"}
    return Quantization(**{**values, "dtype": DTYPES[values["dtype"]]})
