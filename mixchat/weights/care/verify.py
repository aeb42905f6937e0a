"""Compares every byte of an installed model with its manifest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from mixchat.base.errors import CheckpointError
from mixchat.base.files import open_regular, read_bytes
from mixchat.base.progress import Progress, Task, progress_bar
from mixchat.weights.format.file_layout import FileLayout, file_layouts
from mixchat.weights.format.installed_model import installed_blueprint
from mixchat.weights.format.manifest import (
    MANIFESTS,
    Manifest,
    is_manifest,
    path_of,
    read_either_manifest,
)
from mixchat.weights.make.recheck import read_most
from mixchat.weights.source.checkpoint_files import CONFIG

HEADER, SIZE, MISSING = "its header", "its size", "it is missing"


@dataclass(frozen=True)
class Damage:
    """A file that differs from the manifest; `what` is a tensor's name, or one of the above."""

    file: str
    what: str | None = None

    def __str__(self) -> str:
        return f"{self.file}: {self.what}" if self.what else self.file


def verify(directory: Path, progress: Progress) -> list[Damage]:
    """Read every byte of an installed model; return everything that differs from the manifest.

    Raises `CheckpointError` where neither the manifest nor its copy can be read: then there is
    nothing to compare with.
    """
    manifest = read_either_manifest(directory)
    with progress_bar(progress, f"verifying {directory.name}", manifest.size) as task:
        found = [Damage(name) for name in MANIFESTS if not is_manifest(directory / name)]
        found += _damaged_files(directory, manifest)
        # A damaged config does not tell where the tensors lie.
        if Damage(CONFIG) not in found:
            found += _damaged_weights(directory, manifest, task)
    return found


def _damaged_files(directory: Path, manifest: Manifest) -> Iterator[Damage]:
    for name, record in manifest.files.items():
        try:
            data = read_bytes(directory / name)
        except CheckpointError:
            data = b""
        if hashlib.sha256(data).hexdigest() != record.sha256:
            yield Damage(name)


def _damaged_weights(directory: Path, manifest: Manifest, task: Task) -> Iterator[Damage]:
    for name, layout in file_layouts(installed_blueprint(directory, manifest)).items():
        try:
            with open(open_regular(path_of(directory, manifest, name)), "rb", buffering=0) as file:
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
