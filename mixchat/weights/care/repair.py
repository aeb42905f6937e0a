"""Compares an installed model with its manifest, and rebuilds what is damaged."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from mixchat.base.errors import CheckpointError
from mixchat.base.files import open_regular, read_bytes, read_piece, write_file
from mixchat.base.progress import Progress, Task, progress_bar
from mixchat.base.safetensors import Header, tensor_bytes, wrong_tensors
from mixchat.weights.format.installed_model import installed_blueprint
from mixchat.weights.format.manifest import (
    MANIFESTS,
    Manifest,
    is_manifest,
    read_either_manifest,
    read_manifest,
)
from mixchat.weights.format.model_files import finish_replacement, path_of
from mixchat.weights.make.parts import ModelPart, model_parts
from mixchat.weights.make.writer import ModelWriter
from mixchat.weights.source.checkpoint import Checkpoint, CheckpointReader
from mixchat.weights.source.checkpoint_index import CONFIG

HEADER, SIZE, MISSING = "its header", "its size", "it is missing"


@dataclass(frozen=True)
class Damage:
    """A file that differs from the manifest. `place` is a tensor's name, or one of the above."""

    file: str
    place: str | None = None

    def __str__(self) -> str:
        return f"{self.file}: {self.place}" if self.place else self.file


def verify(directory: Path, progress: Progress) -> list[Damage]:
    """Read every byte of an installed model, and return all that differs from the manifest.

    Raises `CheckpointError` if neither the manifest nor its copy can be read.
    """
    manifest = read_either_manifest(directory)
    with progress_bar(progress, f"verifying {directory.name}", manifest.size) as task:
        found = [Damage(name) for name in MANIFESTS if not is_manifest(directory / name)]
        found += _damaged_files(directory, manifest)
        # A damaged config does not tell where the tensors lie.
        if Damage(CONFIG) not in found:
            found += _damaged_weights(directory, manifest, task)
    return found


def repair(
    directory: Path, damages: Sequence[Damage], checkpoint: Checkpoint, progress: Progress
) -> None:
    """Rebuild what is damaged. May be repeated after a failure.

    Raises `CheckpointError` if the checkpoint no longer has the same bytes.
    """
    finish_replacement(directory)
    manifest = read_manifest(directory)
    for name in sorted({damage.file for damage in damages} & set(manifest.files)):
        data = read_bytes(checkpoint.companions() / name)
        _check_digest(manifest.files[name].sha256, data, name)
        write_file(directory / name, data)
    if Damage(CONFIG) in damages:
        damages = verify(directory, progress)
    _repair_weights(directory, manifest, damages, checkpoint, progress)


def _damaged_files(directory: Path, manifest: Manifest) -> Iterator[Damage]:
    for name, record in manifest.files.items():
        try:
            data = read_bytes(directory / name)
        except CheckpointError:
            data = b""
        if hashlib.sha256(data).hexdigest() != record.sha256:
            yield Damage(name)


def _damaged_weights(directory: Path, manifest: Manifest, task: Task) -> Iterator[Damage]:
    for name, header in installed_blueprint(directory, manifest).headers().items():
        known = manifest.weights[name].sha256
        digests = {spec.name: known[spec.name] for spec in header.specs}
        try:
            with open(open_regular(path_of(directory, manifest, name)), "rb") as file:
                yield from _damages_of(file.fileno(), name, header, task)
                for tensor in wrong_tensors(file.fileno(), header, digests, task):
                    yield Damage(name, tensor)
        except OSError:
            yield Damage(name, MISSING)


def _damages_of(descriptor: int, name: str, header: Header, task: Task) -> Iterator[Damage]:
    if os.fstat(descriptor).st_size != header.size:
        yield Damage(name, SIZE)
    beginning = header.beginning
    if read_piece(descriptor, 0, len(beginning)) != beginning:
        yield Damage(name, HEADER)
    task.advance(len(beginning))


def _repair_weights(
    directory: Path,
    manifest: Manifest,
    damages: Sequence[Damage],
    checkpoint: Checkpoint,
    progress: Progress,
) -> None:
    """Rebuild the damaged parts. Opening a file repairs its header and its size."""
    blueprint, index = installed_blueprint(directory, manifest), checkpoint.index
    damaged = [part for part in model_parts(blueprint) if _is_damaged(part, damages)]
    total = sum(index.nbytes(part.components(index)) for part in damaged)
    with (
        closing(ModelWriter(directory, blueprint)) as files,
        CheckpointReader(checkpoint, manifest.checkpoint) as reader,
        progress_bar(progress, f"repairing {directory.name}", total) as task,
    ):
        for part in damaged:
            _refuse_calibrated(part, directory)
            tensors = part.make(index, reader.read)
            _check_tensors(part, tensors, manifest)
            files.write(part, tensors)
            task.advance(index.nbytes(part.components(index)))
        files.finish()


def _check_tensors(part: ModelPart, tensors: list[torch.Tensor], manifest: Manifest) -> None:
    for spec, tensor in zip(part.tensors, tensors, strict=True):
        expected = manifest.weights[part.file].sha256[spec.name]
        _check_digest(expected, tensor_bytes(tensor), spec.name)


def _refuse_calibrated(part: ModelPart, directory: Path) -> None:
    if part.linear is not None and part.linear.scales == "calibrated":
        one, many = ("an expert", "experts") if part.expert else ("a matrix", "matrices")
        raise CheckpointError(
            f"{one} of {part.file} is damaged, and calibrated {many} cannot be rebuilt alone",
            hint=f"Remove the model (mixchat rm {directory.name}), and download it again.",
        )


def _is_damaged(part: ModelPart, damages: Sequence[Damage]) -> bool:
    return Damage(part.file, MISSING) in damages or any(
        Damage(part.file, spec.name) in damages for spec in part.tensors
    )


def _check_digest(sha256: str, data: bytes | memoryview, name: str) -> None:
    if hashlib.sha256(data).hexdigest() != sha256:
        raise CheckpointError(
            f"{name}: its source no longer gives the bytes that were installed",
            hint="Remove the model (mixchat rm) and download it again.",
        )
