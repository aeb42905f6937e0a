"""Compares an installed model with its manifest, and rebuilds what is damaged."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mixchat.base.errors import CheckpointError
from mixchat.base.files import open_regular, read_bytes, read_piece, write_file
from mixchat.base.progress import Progress, Task, progress_bar
from mixchat.base.safetensors import Header, tensor_bytes, wrong_tensors
from mixchat.install.make.parts import ModelPart
from mixchat.install.make.rebuild import Rebuild, Remake
from mixchat.install.source.checkpoint import Checkpoint, CheckpointReader
from mixchat.install.source.checkpoint_index import CONFIG
from mixchat.weights.format.installed_model import installed_blueprint
from mixchat.weights.format.manifest import (
    MANIFESTS,
    WeightsRecord,
    is_manifest,
    read_either_manifest,
    read_manifest,
)

HEADER = "its header"
SIZE = "its size"
MISSING = "it is missing"


@dataclass(frozen=True)
class Damage:
    """A fault of a file. `detail` is a tensor's name, or one of the words above."""

    file: str
    detail: str | None = None

    def __str__(self) -> str:
        return f"{self.file}: {self.detail}" if self.detail else self.file


def verify(directory: Path, progress: Progress) -> list[Damage]:
    """Read every byte of an installed model, and return all that differs from the manifest.

    Raises `CheckpointError` if neither the manifest nor its copy can be read.
    """
    manifest = read_either_manifest(directory)
    with progress_bar(progress, f"verifying {directory.name}", manifest.size) as task:
        damages = [Damage(name) for name in MANIFESTS if not is_manifest(directory / name)]
        for name, record in manifest.files.items():
            try:
                data = read_bytes(directory / name)
            except CheckpointError:
                data = b""
            if hashlib.sha256(data).hexdigest() != record.sha256:
                damages.append(Damage(name))
        # Without an intact config it is not known where the tensors lie.
        if Damage(CONFIG) not in damages:
            for name, header in installed_blueprint(directory, manifest).headers().items():
                damages += _damages_of(directory / name, header, manifest.weights[name], task)
    return damages


def repair(
    directory: Path, damages: Sequence[Damage], checkpoint: Checkpoint, progress: Progress
) -> None:
    """Rebuild what is damaged. May be repeated after a failure.

    Raises `CheckpointError` if the checkpoint no longer has the same bytes.
    """
    manifest = read_manifest(directory)
    # Small files are replaced where they are, each in one step, by the bytes in the manifest.
    for name in sorted({damage.file for damage in damages} & set(manifest.files)):
        data = read_bytes(checkpoint.companions() / name)
        _check_digest(manifest.files[name].sha256, data, name)
        write_file(directory / name, data)
    if Damage(CONFIG) in damages:
        damages = verify(directory, progress)
    damaged = {damage.file for damage in damages} & manifest.weights.keys()
    if not damaged:
        return
    with CheckpointReader(checkpoint, manifest.checkpoint) as reader:

        def is_damaged(part: ModelPart) -> bool:
            details = [MISSING, *(spec.name for spec in part.tensors)]
            return any(Damage(part.file, detail) in damages for detail in details)

        def make(part: ModelPart) -> list[torch.Tensor]:
            if part.linear is not None and part.linear.scales == "calibrated":
                noun, many = ("an expert", "experts") if part.expert else ("a matrix", "matrices")
                raise CheckpointError(
                    f"{noun} of {part.file} is damaged, and calibrated {many} cannot be "
                    "rebuilt alone",
                    hint=f"Remove the model (mixchat rm {directory.name}), and download it again.",
                )
            tensors = part.make(checkpoint.index, reader.read)
            for spec, tensor in zip(part.tensors, tensors, strict=True):
                expected = manifest.weights[part.file].sha256[spec.name]
                _check_digest(expected, tensor_bytes(tensor), spec.name)
            return tensors

        blueprint = installed_blueprint(directory, manifest)
        build = Rebuild(directory, blueprint, "repairing", Remake(is_damaged, make), damaged)
        progress.note(f"repairing takes {build.need}")
        build.run(progress)


def _damages_of(path: Path, header: Header, record: WeightsRecord, task: Task) -> Iterator[Damage]:
    """Yield the damages of a file of weights, of which every byte is read."""
    digests = {spec.name: record.sha256[spec.name] for spec in header.specs}
    try:
        with open(open_regular(path), "rb") as file:
            if os.fstat(file.fileno()).st_size != header.size:
                yield Damage(path.name, SIZE)
            beginning = header.beginning
            if read_piece(file.fileno(), 0, len(beginning)) != beginning:
                yield Damage(path.name, HEADER)
            task.advance(len(beginning))
            for tensor in wrong_tensors(file.fileno(), header, digests, task):
                yield Damage(path.name, tensor)
    except OSError:
        yield Damage(path.name, MISSING)


def _check_digest(sha256: str, data: bytes | memoryview, name: str) -> None:
    if hashlib.sha256(data).hexdigest() != sha256:
        raise CheckpointError(
            f"{name}: its source no longer gives the bytes that were installed",
            hint="Remove the model (mixchat rm) and download it again.",
        )
