"""Rebuilds the damaged parts of an installed model from the checkpoint that it was made of."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch

from mixchat.base.errors import CheckpointError
from mixchat.base.files import read_bytes, write_file
from mixchat.base.progress import Progress, progress_bar
from mixchat.base.safetensors import tensor_bytes
from mixchat.weights.care.verify import MISSING, Damage, verify
from mixchat.weights.format.installed_model import installed_blueprint
from mixchat.weights.format.manifest import Manifest, read_manifest
from mixchat.weights.format.replacement import finish_replacement
from mixchat.weights.make.parts import Part, parts
from mixchat.weights.make.writer import ModelWriter
from mixchat.weights.source.checkpoint import Checkpoint, CheckpointReader
from mixchat.weights.source.checkpoint_files import CONFIG
from mixchat.weights.source.checkpoint_index import CheckpointIndex, Read


def repair(
    directory: Path, damages: Sequence[Damage], checkpoint: Checkpoint, progress: Progress
) -> None:
    """Rebuild what is damaged; only the tensors needed for it are read.

    Raises `CheckpointError` where the checkpoint no longer has the same bytes, and what reading
    it raises. May be repeated after a failure.
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


def _repair_weights(
    directory: Path,
    manifest: Manifest,
    damages: Sequence[Damage],
    checkpoint: Checkpoint,
    progress: Progress,
) -> None:
    """Rebuild the parts with damaged tensors; opening a file repairs its header and its size."""
    blueprint, index = installed_blueprint(directory, manifest), checkpoint.index
    damaged = [part for part in parts(blueprint) if _is_damaged(part, damages)]
    total = sum(index.nbytes(part.components(index)) for part in damaged)
    with (
        closing(ModelWriter(directory, blueprint)) as files,
        CheckpointReader(checkpoint, manifest.checkpoint) as reader,
        progress_bar(progress, f"repairing {directory.name}", total) as task,
    ):
        for part in damaged:
            _refuse_calibrated(part, directory)
            files.write(part, made_again(part, manifest, index, reader.read))
            task.advance(index.nbytes(part.components(index)))
        files.finish()


def made_again(
    part: Part, manifest: Manifest, index: CheckpointIndex, read: Read
) -> list[torch.Tensor]:
    """Make a part as it was installed. Raises `CheckpointError` where that gives other bytes."""
    tensors = part.make(index, read)
    for spec, tensor in zip(part.tensors, tensors, strict=True):
        expected = manifest.weights[part.file].sha256[spec.name]
        _check_digest(expected, tensor_bytes(tensor), spec.name)
    return tensors


def _refuse_calibrated(part: Part, directory: Path) -> None:
    if part.linear is not None and part.linear.scales == "calibrated":
        raise CheckpointError(
            f"an expert of {part.file} is damaged, and calibrated experts cannot be rebuilt alone",
            hint=f"Remove the model (mixchat rm {directory.name}), and download it again.",
        )


def _is_damaged(part: Part, damages: Sequence[Damage]) -> bool:
    return Damage(part.file, MISSING) in damages or any(
        Damage(part.file, spec.name) in damages for spec in part.tensors
    )


def _check_digest(sha256: str, data: bytes | memoryview, name: str) -> None:
    if hashlib.sha256(data).hexdigest() != sha256:
        raise CheckpointError(
            f"{name}: its source no longer gives the bytes that were installed",
            hint="Remove the model (mixchat rm) and download it again.",
        )
