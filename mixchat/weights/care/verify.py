"""Every byte of a kept model against its manifest, and what is damaged made again, alone."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from mixchat.errors import CheckpointError
from mixchat.files import open_regular, read_bytes, write_file
from mixchat.progress import Progress, Task, running
from mixchat.safetensors import tensor_bytes
from mixchat.weights.care.convert import manifest_as_it_lies, parts_as_they_lie
from mixchat.weights.format.file_layout import FileLayout, layouts
from mixchat.weights.format.installed_model import installed_blueprint
from mixchat.weights.format.manifest import MANIFESTS, Manifest, is_manifest, read_either_manifest
from mixchat.weights.make.parts import Part
from mixchat.weights.make.recheck import read_most
from mixchat.weights.make.writer import ModelWriter
from mixchat.weights.source.checkpoint_files import CONFIG
from mixchat.weights.source.origin import Origin, Readers

HEADER, SIZE, MISSING = "its header", "its size", "it is missing"


@dataclass(frozen=True)
class Damage:
    """A file that is not as the manifest says; `what` is a tensor's name, or one of the above."""

    file: str
    what: str | None = None

    def __str__(self) -> str:
        return f"{self.file}: {self.what}" if self.what else self.file


def verify(directory: Path, progress: Progress) -> list[Damage]:
    """Read every byte of a kept model; whatever is not as its manifest says.

    Raises `CheckpointError` where neither the manifest nor its copy can be read: then nothing can
    be said.
    """
    manifest = manifest_as_it_lies(directory, read_either_manifest(directory))
    with running(progress, f"verifying {directory.name}", manifest.size) as task:
        found = [Damage(name) for name in MANIFESTS if not is_manifest(directory / name)]
        found += _damaged_files(directory, manifest)
        # The config says where tensors lie: where it is damaged, nothing is known of them.
        if Damage(CONFIG) not in found:
            found += _damaged_weights(directory, manifest, task)
    return found


def repair(directory: Path, damages: Sequence[Damage], origin: Origin, progress: Progress) -> None:
    """Make again what is damaged, from the checkpoint that the model was made of.

    Only the tensors needed for it are read. Raises `CheckpointError` where the origin no longer
    gives the same bytes, and what reading it raises. May be repeated after a failure.
    """
    manifest = manifest_as_it_lies(directory, read_either_manifest(directory))
    for name in sorted({damage.file for damage in damages} & set(manifest.files)):
        data = read_bytes(origin.companions() / name)
        _must_be(manifest.files[name].sha256, data, name)
        write_file(directory / name, data)
    if Damage(CONFIG) in damages:
        damages = verify(directory, progress)
    _remake(directory, manifest, damages, origin, progress)


def _damaged_files(directory: Path, manifest: Manifest) -> Iterator[Damage]:
    for name, record in manifest.files.items():
        try:
            data = read_bytes(directory / name)
        except CheckpointError:
            data = b""
        if hashlib.sha256(data).hexdigest() != record.sha256:
            yield Damage(name)


def _damaged_weights(directory: Path, manifest: Manifest, task: Task) -> Iterator[Damage]:
    for name, layout in layouts(installed_blueprint(directory, manifest)).items():
        try:
            with open(open_regular(directory / name), "rb", buffering=0) as file:
                yield from _damaged_tensors(file, name, layout, manifest, task)
        except OSError:
            yield Damage(name, MISSING)


def _damaged_tensors(
    file: FileIO, name: str, layout: FileLayout, manifest: Manifest, task: Task
) -> Iterator[Damage]:
    if os.fstat(file.fileno()).st_size != layout.size:
        yield Damage(name, SIZE)
    if read_most(file, len(layout.start)) != layout.start:
        yield Damage(name, HEADER)
    task.advance(len(layout.start))
    for spec in layout.header.specs:
        data = read_most(file, spec.nbytes)
        if hashlib.sha256(data).hexdigest() != manifest.weights[name].sha256[spec.name]:
            yield Damage(name, spec.name)
        task.advance(spec.nbytes)


def _remake(
    directory: Path,
    manifest: Manifest,
    damages: Sequence[Damage],
    origin: Origin,
    progress: Progress,
) -> None:
    """Make the parts with damaged tensors; opening a file mends its header and its size."""
    blueprint, index = installed_blueprint(directory, manifest), origin.index
    damaged = [
        part for part in parts_as_they_lie(directory, blueprint) if _is_damaged(part, damages)
    ]
    whole = sum(index.nbytes(part.components(index)) for part in damaged)
    with (
        closing(ModelWriter(directory, blueprint)) as files,
        Readers(origin) as readers,
        running(progress, f"repairing {directory.name}", whole) as task,
    ):
        for part in damaged:
            tensors = part.make(index, readers.read)
            for spec, tensor in zip(part.tensors, tensors, strict=True):
                expected = manifest.weights[part.file].sha256[spec.name]
                _must_be(expected, tensor_bytes(tensor), spec.name)
            files.write(part, tensors)
            task.advance(index.nbytes(part.components(index)))
        files.finish()


def _is_damaged(part: Part, damages: Sequence[Damage]) -> bool:
    return Damage(part.file, MISSING) in damages or any(
        Damage(part.file, spec.name) in damages for spec in part.tensors
    )


def _must_be(sha256: str, data: bytes | memoryview, name: str) -> None:
    if hashlib.sha256(data).hexdigest() != sha256:
        raise CheckpointError(
            f"{name}: its source no longer gives the bytes that were kept",
            hint="Remove the model (mixchat rm) and download it again.",
        )
