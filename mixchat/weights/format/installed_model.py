"""Opens an installed model for reading, and refuses files that are not exactly its own."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from mixchat.base.errors import CheckpointError
from mixchat.base.safetensors import SafetensorsFile, TensorSpec
from mixchat.weights.families.read_config import read_config_file
from mixchat.weights.format.blueprint import (
    SHARED_FILE,
    Blueprint,
    Quantization,
    experts_file,
    layers_unlike,
)
from mixchat.weights.format.manifest import (
    MANIFEST_FILE,
    Manifest,
    check_files,
    read_manifest,
    repair_hint,
)
from mixchat.weights.matrix.linear import LinearSpec
from mixchat.weights.matrix.on_device import build_linear, build_parts
from mixchat.weights.matrix.quant_type import Linear


def installed_blueprint(directory: Path, manifest: Manifest) -> Blueprint:
    """Return the blueprint of an installed model. Raises `CheckpointError`."""
    config = read_config_file(directory / "config.json")
    names = [SHARED_FILE, *map(experts_file, range(config.num_moe_layers))]
    for name in names:
        if name not in manifest.weights:
            raise _other_tensors(directory / name)
    shared, *layers = (
        Quantization.from_description(manifest.quantization_of(name)) for name in names
    )
    blueprint = Blueprint(config, shared, layers_unlike(shared, layers))
    for name, specs in blueprint.files().items():
        if {spec.name for spec in specs} != set(manifest.weights[name].sha256):
            raise _other_tensors(directory / name)
    return blueprint


class InstalledModel:
    """An installed model, open for reading.

    Opening checks sizes and headers, but hashes no bytes, since 24 GB would take half a minute.
    Raises `CheckpointError`.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files: list[SafetensorsFile] = []
        # A new model can take this one's place meanwhile. Then files of both models are read, and
        # look damaged.
        stamp = _stamp(directory)
        try:
            self.manifest = read_manifest(directory)
            check_files(directory, self.manifest)
            self.blueprint = installed_blueprint(directory, self.manifest)
            self.config = self.blueprint.config
            self._shared = self._open(SHARED_FILE, self.blueprint.shared_tensors())
            self._experts = [
                self._open(experts_file(layer), self.blueprint.expert_tensors(layer))
                for layer in range(self.config.num_moe_layers)
            ]
            first = next(self.blueprint.expert_tensors(0)).name
            self._expert_base = [file.header.start(first) for file in self._experts]
        except CheckpointError:
            self.close()
            if _stamp(directory) == stamp:
                raise
        if _stamp(directory) != stamp:
            self.close()
            raise CheckpointError(
                f"{directory}: the model was changed while it was being loaded",
                hint="Try again when the other command has finished.",
            )

    def tensor(self, spec: TensorSpec) -> torch.Tensor:
        return self._shared.read(spec.name)

    def rows(self, spec: TensorSpec, numbers: torch.Tensor) -> torch.Tensor:
        """Read rows [n, ...] of a shared tensor to the CPU. Their numbers [n] may repeat."""
        return self._shared.read_rows(spec.name, numbers)

    def linear(self, spec: LinearSpec, device: torch.device) -> Linear:
        """Read a shared matrix to `device`."""
        return build_linear(spec, self._read(spec, device))

    def parts(self, spec: LinearSpec, count: int, device: torch.device) -> list[Linear]:
        """Read a shared matrix to `device`, as `count` matrices that lie one above the other."""
        return build_parts(spec, self._read(spec, device), count)

    def _read(self, spec: LinearSpec, device: torch.device) -> list[torch.Tensor]:
        return [self._shared.read(tensor.name).to(device) for tensor in spec.tensors]

    def open_direct(self) -> bool:
        """Prepare `direct` reads and return whether they are possible."""
        return all(file.open_direct() for file in self._experts)

    def read_expert(
        self, layer: int, expert: int, block: torch.Tensor, begin: int = 0, *, direct: bool = False
    ) -> None:
        """Fill `block` (uint8 [n], on the CPU) with an expert's bytes from `begin` on, in one read.

        `direct` bypasses the page cache. Then `begin`, the block's address and its length have to
        be multiples of 4096.
        """
        start = self._expert_base[layer] + expert * self.blueprint.expert_of(layer).stride + begin
        self._experts[layer].read_into(block, start, direct=direct)

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> InstalledModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, name: str, expected: Iterable[TensorSpec]) -> SafetensorsFile:
        file = SafetensorsFile(self.directory / name)
        self._files.append(file)
        if file.header.specs != list(expected):
            raise _other_tensors(file.path)
        return file


def _stamp(directory: Path) -> tuple[int, int] | None:
    """Return numbers that differ once another model has taken this one's place."""
    try:
        status = (directory / MANIFEST_FILE).stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns  # an inode can be used again


def _other_tensors(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: its tensors are not those of this model", hint=repair_hint(path.parent)
    )
