"""Writes a model's files of weights, their tensors in any order."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from mixchat.base.files import open_regular, sync_directory
from mixchat.base.safetensors import Header, tensor_bytes
from mixchat.weights.make.parts import ModelPart


class ModelWriter:
    """The files of weights in `directory`, open for writing, with holes at first."""

    def __init__(self, directory: Path, headers: Mapping[str, Header]) -> None:
        self._directory, self._headers = directory, headers
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
        """Make all files durable, also those without a part that was left to make."""
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


def _write_at(descriptor: int, data: memoryview, start: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], start + done)
