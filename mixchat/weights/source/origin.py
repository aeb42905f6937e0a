"""Where a checkpoint's files come from, one shard at a time: what a directory and the hub share."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Protocol

import torch

from mixchat.errors import CheckpointError
from mixchat.files import read_bytes, require_regular
from mixchat.model_config import ModelConfig
from mixchat.progress import Task
from mixchat.safetensors import SafetensorsFile
from mixchat.weights.format.manifest import Source
from mixchat.weights.source.checkpoint_files import (
    COMPANION_FILES,
    CONFIG,
    INDEX,
    read_weight_map,
    weight_files,
)
from mixchat.weights.source.index import SourceIndex


class TensorReader(Protocol):
    """Reads the tensors of one shard: a context manager."""

    def read(self, name: str) -> torch.Tensor: ...

    def __enter__(self) -> TensorReader: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


class Origin(Protocol):
    """A checkpoint, here or elsewhere. `fingerprint` differs where its weights do."""

    source: Source
    index: SourceIndex
    fingerprint: str

    def companions(self) -> Path:
        """The directory with the small files: config, tokenizer, template."""

    def missing(self, shard: str) -> int:
        """Bytes of a shard that would have to be fetched."""

    def temporary(self, shard: str) -> int:
        """Bytes of disk that a shard takes until it is released."""

    def fetch(self, shard: str, task: Task, stop: Event) -> Path:
        """Bring a shard onto this disk, whole and checked, moving the bar by `missing` bytes.

        Ends early, with `Stopped`, once `stop` is set.
        """

    def release(self, shard: str) -> None:
        """Let go of a shard whose tensors have all been taken."""

    def open(self, shard: str) -> TensorReader:
        """Read a few tensors of a shard, without fetching all of it."""

    def rate(self, shards: Sequence[str], *, keep: bool) -> float | None:
        """Bytes a second at which these shards come now; None where nothing has to, or does.

        It tries for a second; `keep` what comes, for `fetch` to go on with.
        """


class Stopped(Exception):
    """The work was called off."""


class LocalOrigin:
    """A checkpoint in a directory. Opening it reads every shard's header.

    `fingerprint` is the files' sizes and times, unless given. Raises `CheckpointError` where it is
    not a whole Mixtral in safetensors.
    """

    def __init__(self, directory: Path, source: Source, fingerprint: str | None = None) -> None:
        self.source, self._directory = source, directory
        config = ModelConfig.from_file(directory / CONFIG)
        where = str(directory)
        try:
            names = [entry.name for entry in directory.iterdir()]
        except OSError as error:
            raise CheckpointError(f"{where}: cannot be read ({error.strerror})") from None
        for name in COMPANION_FILES:  # before hours of work, not after them
            if (directory / name).exists():
                require_regular(directory / name)
        index = read_bytes(directory / INDEX) if INDEX in names else None
        headers = {}
        for name in weight_files(names, index, where=where):
            with SafetensorsFile(directory / name) as file:
                headers[name] = file.header
        weight_map = None if index is None else read_weight_map(index, where=where)
        self.index = SourceIndex(config, headers, weight_map, where)
        self.fingerprint = fingerprint or self._fingerprint()

    def companions(self) -> Path:
        return self._directory

    def missing(self, shard: str) -> int:
        return 0

    def temporary(self, shard: str) -> int:
        return 0

    def fetch(self, shard: str, task: Task, stop: Event) -> Path:
        return self._directory / shard

    def release(self, shard: str) -> None:
        pass

    def open(self, shard: str) -> TensorReader:
        return SafetensorsFile(self._directory / shard)

    def rate(self, shards: Sequence[str], *, keep: bool) -> float | None:
        return None

    def _fingerprint(self) -> str:
        stats = [(name, (self._directory / name).stat()) for name in self.index.shards]
        text = repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
        return hashlib.sha256(text.encode()).hexdigest()


class Readers:
    """Finds a tensor in whichever of an origin's shards it lies: a context manager."""

    def __init__(self, origin: Origin) -> None:
        self._origin = origin
        self._open: dict[str, TensorReader] = {}
        self._stack = ExitStack()

    def read(self, name: str) -> torch.Tensor:
        shard = self._origin.index.shard_of(name)
        if shard not in self._open:
            self._open[shard] = self._stack.enter_context(self._origin.open(shard))
        return self._open[shard].read(name)

    def __enter__(self) -> Readers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()
