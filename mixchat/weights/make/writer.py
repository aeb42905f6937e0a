"""Writes a model's files of weights, their tensors in any order."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from mixchat.base.files import open_regular, sync_directory
from mixchat.base.safetensors import tensor_bytes
from mixchat.weights.format.blueprint import Blueprint
from mixchat.weights.format.file_layout import file_layouts
from mixchat.weights.make.parts import Part


class ModelWriter:
    """The files of weights below `directory`, open for writing.

    They have their full size and their names from the start, with holes where nothing is written
    yet: without a manifest they are not a model.
    """

    def __init__(self, directory: Path, blueprint: Blueprint) -> None:
        self._directory = directory
        self._layouts = file_layouts(blueprint)
        self._fds: dict[str, int] = {}
        self._unsynced: set[str] = set()
        self._unnamed = False

    def write(self, part: Part, tensors: Sequence[torch.Tensor]) -> dict[str, str]:
        """Write the tensors of a part; return the SHA-256 in hex of each, by name."""
        fd = self._open(part.file)
        header = self._layouts[part.file].header
        digests = {}
        for spec, tensor in zip(part.tensors, tensors, strict=True):
            assert (spec.dtype, spec.shape) == (tensor.dtype, tuple(tensor.shape)), spec
            data = tensor_bytes(tensor)
            _write_at(fd, data, header.start(spec.name))
            digests[spec.name] = hashlib.sha256(data).hexdigest()
        self._unsynced.add(part.file)
        return digests

    def sync(self) -> None:
        """Make the written bytes and the files' names durable."""
        for name in self._unsynced:
            os.fsync(self._fds[name])
        self._unsynced.clear()
        if self._unnamed:
            sync_directory(self._directory)
            self._unnamed = False

    def finish(self) -> dict[str, int]:
        """Make all files durable and return the size in bytes of each."""
        for name in self._layouts:
            self._open(name)
        self.sync()
        return {name: layout.size for name, layout in self._layouts.items()}

    def close(self) -> None:
        """Close all files."""
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def _open(self, name: str) -> int:
        if name not in self._fds:
            flags = os.O_RDWR | os.O_CREAT
            fd = self._fds[name] = open_regular(self._directory / name, flags, follow=False)
            layout = self._layouts[name]
            _write_at(fd, memoryview(layout.start), 0)
            os.ftruncate(fd, layout.size)
            self._unsynced.add(name)
            self._unnamed = True
        return self._fds[name]


def _write_at(fd: int, data: memoryview, start: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], start + done)
