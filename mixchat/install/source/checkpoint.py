"""A checkpoint and its files, in a directory on this machine or fetched from elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from threading import Event
from types import MappingProxyType
from typing import Protocol

import torch

from mixchat.base.errors import CheckpointError
from mixchat.base.files import read_bytes, reading, require_regular
from mixchat.base.progress import Task
from mixchat.base.safetensors import SafetensorsFile, tensor_sha256
from mixchat.install.source.checkpoint_index import (
    CONFIG,
    INDEX,
    CheckpointIndex,
    read_weight_map,
    shard_files,
)
from mixchat.weights.families.read_config import read_config_file
from mixchat.weights.format.manifest import Source
from mixchat.weights.format.own_files import COMPANION_FILES


class ShardReader(Protocol):
    """A context manager that reads single tensors of one shard."""

    def read(self, name: str) -> torch.Tensor: ...

    def __enter__(self) -> ShardReader: ...

    def __exit__(self, *_: object) -> None: ...


class Checkpoint:
    """A checkpoint whose files are on this disk, or fetched to it shard by shard.

    `size`: bytes to fetch for all of its weights. `fingerprint` differs if its weights differ.
    `cache`: the directory in which fetched shards stay, if they do.
    """

    source: Source
    index: CheckpointIndex
    size: int
    fingerprint: str
    cache: Path | None = None

    def companions(self) -> Path:
        """Fetch the small files (config, tokenizer, template) and return their directory."""
        raise NotImplementedError

    def missing(self, shard: str) -> int:
        """Return how many bytes of a shard have to be fetched."""
        return 0

    def temporary(self, shard: str) -> int:
        """Return the bytes of disk that a shard takes until it is released."""
        return 0

    def fetch(self, shard: str, task: Task, stop: Event) -> Path:
        """Bring a shard onto this disk, complete and checked.

        Advances `task` by `missing` bytes. Raises `Stopped` soon after `stop` is set.
        """
        return self.companions() / shard

    def release(self, shard: str) -> None:
        """Delete a shard that was fetched."""

    def open(self, shard: str) -> ShardReader:
        """Return a reader for a few tensors of a shard that need not be fetched."""
        return self.index.open(shard, self.companions() / shard)

    def rate(self, shards: Sequence[str], *, keep: bool) -> float | None:
        """Measure how fast these shards come, in bytes a second, None if none has to be fetched.

        With `keep`, the bytes that came stay, and `fetch` continues after them.
        """
        return None

    def close(self) -> None:
        """Remove the files that were fetched and do not stay."""


class DirectoryCheckpoint(Checkpoint):
    """A checkpoint in a directory. Raises `CheckpointError` if it is not complete."""

    def __init__(self, directory: Path, source: Source) -> None:
        self.source = source
        self._directory = directory
        config = read_config_file(directory / CONFIG)
        where = str(directory)
        with reading(directory):
            names = [entry.name for entry in directory.iterdir()]
        # The small files are copied last. A FIFO or device among them has to fail now, not after
        # hours.
        for name in COMPANION_FILES:
            if (directory / name).exists():
                require_regular(directory / name)
        index = read_bytes(directory / INDEX) if INDEX in names else None
        weight_map = read_weight_map(names, index, where=where)
        headers = {}
        for name in shard_files(weight_map):
            with SafetensorsFile(directory / name) as file:
                headers[name] = file.header
        self.index = CheckpointIndex(config, headers, weight_map, where)
        self.size = self.index.size
        files = {name: directory / name for name in self.index.shards}
        self.fingerprint = source.commit or fingerprint_of(files)

    def companions(self) -> Path:
        return self._directory


def fingerprint_of(files: Mapping[str, Path]) -> str:
    """Return a hash that differs if the files' sizes or times do."""
    # Hashing the 93 GB of Mixtral would take minutes.
    stats = [(name, path.stat()) for name, path in sorted(files.items())]
    text = repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
    return hashlib.sha256(text.encode()).hexdigest()


def remove_files(directory: Path, names: Iterable[str]) -> None:
    """Remove small files in a workspace's `source/`, and both directories once they are empty."""
    for name in names:
        (directory / name).unlink(missing_ok=True)
    with suppress(OSError):
        directory.rmdir()
        directory.parent.rmdir()


class Stopped(Exception):
    """The caller set `stop`."""


def other_checkpoint(checkpoint: Checkpoint, file: str, difference: str) -> CheckpointError:
    """Return the error for a checkpoint that differs from the one that a model was made of."""
    return CheckpointError(
        f"{checkpoint.source.repo}: {file} is not what the model was made of ({difference})",
        hint="Bring the checkpoint back as it was, or remove the model (mixchat rm) and download "
        "it again.",
    )


class CheckpointReader:
    """A context manager that reads tensors and checks their known SHA-256s."""

    def __init__(
        self, checkpoint: Checkpoint, expected: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self._checkpoint = checkpoint
        self._expected = expected
        self._open: dict[str, ShardReader] = {}
        self._stack = ExitStack()

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor. Raises `CheckpointError` if its SHA-256 differs."""
        shard = self._checkpoint.index.shard_of(name)
        if shard not in self._open:
            self._open[shard] = self._stack.enter_context(self._checkpoint.open(shard))
        tensor = self._open[shard].read(name)
        digest = tensor_sha256(tensor)
        if digest != self._expected.get(name, digest):
            raise other_checkpoint(self._checkpoint, shard, f"the SHA-256 of {name} differs")
        return tensor

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
