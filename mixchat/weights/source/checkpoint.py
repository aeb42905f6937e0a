"""A checkpoint and its files, as a directory, the hub and the demo have them in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from threading import Event
from types import MappingProxyType
from typing import Protocol

import torch

from mixchat.base.errors import CheckpointError
from mixchat.base.progress import Task
from mixchat.base.safetensors import tensor_sha256
from mixchat.weights.format.manifest import Source
from mixchat.weights.source.checkpoint_index import CheckpointIndex


class ShardReader(Protocol):
    """A context manager that reads single tensors of one shard."""

    def read(self, name: str) -> torch.Tensor: ...

    def __enter__(self) -> ShardReader: ...

    def __exit__(self, *_: object) -> None: ...


class Checkpoint(Protocol):
    """A checkpoint, on this machine or elsewhere.

    `size`: bytes to fetch for all of its weights. `fingerprint` differs if its weights differ.
    `cache`: the directory in which fetched shards stay; None if they do not stay.
    """

    source: Source
    index: CheckpointIndex
    size: int
    fingerprint: str
    cache: Path | None

    def companions(self) -> Path:
        """Fetch the small files (config, tokenizer, template) and return their directory."""

    def missing(self, shard: str) -> int:
        """Return how many bytes of a shard have to be fetched."""

    def temporary(self, shard: str) -> int:
        """Return the bytes of disk that a shard takes until it is released."""

    def fetch(self, shard: str, task: Task, stop: Event) -> Path:
        """Bring a shard onto this disk, complete and checked.

        Advances `task` by `missing` bytes. Raises `Stopped` soon after `stop` is set.
        """

    def release(self, shard: str) -> None:
        """Delete a shard that was fetched, once all of its tensors have been used."""

    def open(self, shard: str) -> ShardReader:
        """Return a reader for a few tensors of a shard that need not be fetched."""

    def rate(self, shards: Sequence[str], *, keep: bool) -> float | None:
        """Measure for a second how fast these shards come, in bytes a second.

        Return None if nothing has to be fetched, or nothing comes. With `keep`, `fetch` continues
        after the bytes that came.
        """


class Stopped(Exception):
    """The caller set `stop`."""


def other_checkpoint(checkpoint: Checkpoint, file: str, difference: str) -> CheckpointError:
    """Return the error for a checkpoint that is not the one that a model was made of."""
    return CheckpointError(
        f"{checkpoint.source.repo}: {file} is not what the model was made of ({difference})",
        hint="Bring the checkpoint back as it was, or remove the model (mixchat rm) and download "
        "it again.",
    )


class CheckpointReader:
    """A context manager that reads a tensor from the shard that holds it.

    expected: the known SHA-256s of tensors. `digests`: the SHA-256s of the tensors that were read.
    """

    def __init__(
        self, checkpoint: Checkpoint, expected: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        self._checkpoint, self._expected = checkpoint, expected
        self._open: dict[str, ShardReader] = {}
        self._stack = ExitStack()
        self.digests: dict[str, str] = {}

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor. Raises `CheckpointError` if it has another SHA-256 than expected."""
        shard = self._checkpoint.index.shard_of(name)
        if shard not in self._open:
            self._open[shard] = self._stack.enter_context(self._checkpoint.open(shard))
        tensor = self._open[shard].read(name)
        digest = self.digests[name] = tensor_sha256(tensor)
        if digest != self._expected.get(name, digest):
            raise other_checkpoint(self._checkpoint, shard, f"the SHA-256 of {name} differs")
        return tensor

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
