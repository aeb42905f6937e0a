"""Opens an installed model for reading; refuses files that are not exactly what they should be."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TypeAlias

import torch

from mixchat.errors import CheckpointError
from mixchat.model_config import ModelConfig
from mixchat.safetensors import SafetensorsFile, TensorSpec
from mixchat.weights.format.blueprint import SHARED_FILE, Blueprint, Quantization, experts_file
from mixchat.weights.format.manifest import (
    CONVERSION_DIR,
    MANIFEST_FILE,
    Manifest,
    check_files,
    read_manifest,
    repair_hint,
)
from mixchat.weights.matrix.linear import Linear, LinearSpec

Stamp: TypeAlias = tuple[int, ...] | None  # identifies a manifest file; None where there is none


def _stamp(directory: Path) -> Stamp:
    try:
        status = (directory / MANIFEST_FILE).stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def installed_blueprint(directory: Path, manifest: Manifest) -> Blueprint:
    """Return the blueprint of an installed model.

    Raises `CheckpointError` where the manifest lists other tensors.
    """
    config = ModelConfig.from_file(directory / "config.json")
    blueprint = Blueprint(config, Quantization.from_description(manifest.quantization))
    for name, specs in blueprint.files().items():
        record = manifest.weights.get(name)
        if record is None or {spec.name for spec in specs} != set(record.sha256):
            raise _other_tensors(directory / name)
    return blueprint


class InstalledModel:
    """An installed model, open for reading.

    Opening checks the manifest, each file's size, and that each header names exactly the tensors,
    types and shapes that the config asks for. Bytes are not hashed: 24 GB would take half a minute.
    The open files stay as they are, even if another process replaces them. Raises
    `CheckpointError`, also where the model was changed while its files were opened.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        before = _stamp(directory)
        self.manifest = read_manifest(directory)
        check_files(directory, self.manifest)
        self.blueprint = installed_blueprint(directory, self.manifest)
        self.config = self.blueprint.config
        self._files: list[SafetensorsFile] = []
        try:
            self._shared = self._open(SHARED_FILE, self.blueprint.shared_tensors())
            self._experts = [
                self._open(experts_file(layer), self.blueprint.expert_tensors())
                for layer in range(self.config.num_hidden_layers)
            ]
            first = next(self.blueprint.expert_tensors()).name
            self._expert_base = [file.header.start(first) for file in self._experts]
            self._check_unchanged(before)
        except BaseException:
            self.close()
            raise

    def tensor(self, spec: TensorSpec) -> torch.Tensor:
        """Read a shared tensor; it is on the CPU."""
        return self._shared.read(spec.name)

    def rows(self, spec: TensorSpec, numbers: torch.Tensor) -> torch.Tensor:
        """Read rows [n, ...] of a shared tensor, whose numbers [n] may repeat; all on the CPU."""
        return self._shared.read_rows(spec.name, numbers)

    def linear(self, spec: LinearSpec, target: LinearSpec, device: torch.device) -> Linear:
        """Read a shared linear map to `device`, its codes in the layout of `target`.

        8 bits are widened where `target` is dense.
        """
        tensors = [self._shared.read(tensor.name).to(device) for tensor in spec.tensors]
        if spec.quant_type != target.quant_type:
            plain = replace(spec, layout="bitsandbytes")
            spec.convert(tensors, plain)
            return target.build([plain.dequantized(tensors)])
        spec.convert(tensors, target)
        return target.build(tensors)

    def open_direct(self) -> bool:
        """Prepare `direct` reads, past the page cache; return whether they are possible."""
        return all(file.open_direct() for file in self._experts)

    def read_expert(
        self, layer: int, expert: int, block: torch.Tensor, begin: int = 0, *, direct: bool = False
    ) -> None:
        """Fill `block` (uint8, on the CPU) with an expert's bytes from `begin` on, in one read.

        An expert has `stride` bytes. With `direct`, the read goes past the page cache; then
        `begin`, the block's address and its length have to be multiples of 4096.
        """
        start = self._expert_base[layer] + expert * self.blueprint.expert.stride + begin
        self._experts[layer].read_into(block, start, direct=direct)

    def close(self) -> None:
        """Close all files."""
        for file in self._files:
            file.close()

    def __enter__(self) -> InstalledModel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _check_unchanged(self, before: Stamp) -> None:
        """Ensure that all files have the layout that the manifest names.

        A conversion makes its directory before it replaces the first file, and writes the manifest
        before it removes the directory: so the directory has to be checked first.
        """
        converting = (self.directory / CONVERSION_DIR).exists()
        if converting or _stamp(self.directory) != before:
            raise CheckpointError(
                f"{self.directory}: the model was changed while it was being loaded",
                hint="Try again when the other command has finished.",
            )

    def _open(self, name: str, expected: Iterable[TensorSpec]) -> SafetensorsFile:
        file = SafetensorsFile(self.directory / name)
        self._files.append(file)
        if file.header.specs != list(expected):
            raise _other_tensors(file.path)
        return file


def _other_tensors(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: its tensors are not those of this model", hint=repair_hint(path.parent)
    )
