"""The files of an unfinished model: its weights, spilled tensors, and the check of both.

A tensor is spilled to disk if the part that needs it also needs a later shard. Finished parts are
checked before work continues, because the manifest would not show what a disk has changed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from mixchat.base.errors import CheckpointError
from mixchat.base.files import open_regular, sync_directory
from mixchat.base.progress import NoProgress, Progress, progress_bar
from mixchat.base.safetensors import (
    Header,
    SafetensorsFile,
    SafetensorsWriter,
    tensor_bytes,
    tensor_sha256,
    wrong_tensors,
)
from mixchat.install.make.parts import ModelPart
from mixchat.weights.format.workspace import MODEL_DIR, SPILL_PREFIX


class ModelWriter:
    """The files of weights in `directory`, open for writing, with holes at first.

    Their tensors come in any order.
    """

    def __init__(self, directory: Path, headers: Mapping[str, Header]) -> None:
        self._directory = directory
        self._headers = headers
        self._descriptors: dict[str, int] = {}
        self._unsynced: set[str] = set()
        self._unnamed = False

    def write(self, part: ModelPart, tensors: Sequence[torch.Tensor]) -> dict[str, str]:
        """Write the tensors of a part, and return their SHA-256s in hex by name."""
        descriptor = self._open(part.file)
        header = self._headers[part.file]
        digests = {}
        for spec, tensor in zip(part.tensors, tensors, strict=True):
            assert (spec.dtype, spec.shape) == (tensor.dtype, tuple(tensor.shape)), spec
            data = tensor_bytes(tensor)
            _write_at(descriptor, data, header.start(spec.name))
            digests[spec.name] = hashlib.sha256(data).hexdigest()
        self._unsynced.add(part.file)
        return digests

    def sync(self) -> None:
        """Make the written bytes and the files' names durable."""
        for name in self._unsynced:
            os.fsync(self._descriptors[name])
        self._unsynced.clear()
        if self._unnamed:
            sync_directory(self._directory)
            self._unnamed = False

    def finish(self) -> None:
        """Make all files durable, also those whose parts were all made before."""
        for name in self._headers:
            self._open(name)
        self.sync()

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _open(self, name: str) -> int:
        if name not in self._descriptors:
            flags = os.O_RDWR | os.O_CREAT
            descriptor = open_regular(self._directory / name, flags, follow=False)
            self._descriptors[name] = descriptor
            header = self._headers[name]
            _write_at(descriptor, memoryview(header.beginning), 0)
            os.ftruncate(descriptor, header.size)
            self._unsynced.add(name)
            self._unnamed = True
        return self._descriptors[name]


class Spill:
    """The spill files in `directory`, one for each shard that has spilled tensors.

    A file that `recorded`, the journal's record, lacks is ignored.
    """

    def __init__(self, directory: Path, recorded: Mapping[str, Collection[str]]) -> None:
        self._directory = directory
        self._files: dict[str, set[str]] = {}
        for name, header in _spill_headers(directory).items():
            tensors = {spec.name for spec in header.specs}
            if tensors <= set(recorded.get(name, ())):
                self._files[name] = tensors

    @property
    def names(self) -> set[str]:
        return set().union(*self._files.values())

    def read(self, name: str) -> torch.Tensor:
        holder = next(file for file, names in self._files.items() if name in names)
        with SafetensorsFile(self._directory / holder) as file:
            return file.read(name)

    def write(
        self, shard: str, file: SafetensorsFile, names: list[str]
    ) -> tuple[str, dict[str, str]]:
        """Copy tensors of `file`, and return the copy's name and their SHA-256s."""
        path = self._directory / f"{SPILL_PREFIX}{shard}"
        digests = {}
        with SafetensorsWriter(path, [file.header.spec(name) for name in names]) as writer:
            for name in names:
                tensor = file.read(name)
                writer.write(name, tensor)
                digests[name] = tensor_sha256(tensor)
        self._files[path.name] = set(names)
        return path.name, digests

    def keep_only(self, names: set[str]) -> None:
        for holder in [file for file, held in self._files.items() if not held & names]:
            (self._directory / holder).unlink()
            del self._files[holder]


def find_damaged(
    work_dir: Path,
    headers: Mapping[str, Header],
    recorded: Mapping[str, Mapping[str, str]],
    progress: Progress,
) -> dict[str, set[str]]:
    """Return the `recorded` tensors in a workspace whose bytes have changed, by file.

    headers: of the files of weights that are being made.
    """
    files = {work_dir / MODEL_DIR / name: header for name, header in headers.items()}
    files |= {work_dir / name: header for name, header in _spill_headers(work_dir).items()}
    known = {
        path: {
            spec.name: recorded[path.name][spec.name]
            for spec in header.specs
            if spec.name in recorded[path.name]
        }
        for path, header in files.items()
        if path.name in recorded
    }
    whole = sum(files[path].spec(tensor).nbytes for path in known for tensor in known[path])
    damaged = {}
    with progress_bar(
        progress if whole else NoProgress(), "checking finished parts", whole
    ) as task:
        for path, digests in known.items():
            try:
                with open(open_regular(path), "rb") as file:
                    wrong = {*wrong_tensors(file.fileno(), files[path], digests, task)}
            except OSError:  # the file is missing, or the disk cannot read it
                wrong = {*digests}
            if wrong:
                # A spill file is written again as a whole.
                is_spill = path.name.startswith(SPILL_PREFIX)
                damaged[path.name] = set(recorded[path.name]) if is_spill else wrong
    return damaged


def _spill_headers(directory: Path) -> dict[str, Header]:
    headers = {}
    for path in directory.glob(SPILL_PREFIX + "*"):
        with suppress(CheckpointError), SafetensorsFile(path) as file:
            headers[path.name] = file.header
    return headers


def _write_at(descriptor: int, data: memoryview, start: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], start + done)
