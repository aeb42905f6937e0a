"""A checkpoint in a directory on this machine, whose files are used where they are."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from threading import Event

from mixchat.base.errors import CheckpointError
from mixchat.base.files import read_bytes, require_regular
from mixchat.base.model_config import ModelConfig
from mixchat.base.progress import Task
from mixchat.base.safetensors import SafetensorsFile
from mixchat.weights.format.manifest import Source
from mixchat.weights.source.checkpoint import ShardReader
from mixchat.weights.source.checkpoint_index import (
    COMPANION_FILES,
    CONFIG,
    INDEX,
    CheckpointIndex,
    read_weight_map,
    shard_files,
)


class DirectoryCheckpoint:
    """A checkpoint in a directory. The constructor reads every shard's header.

    `fingerprint` stands for the files' sizes and times, unless given. Raises `CheckpointError` if
    it is not a complete Mixtral in safetensors.
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
        weight_map = read_weight_map(names, index, where=where)
        headers = {}
        for name in shard_files(weight_map):
            with SafetensorsFile(directory / name) as file:
                headers[name] = file.header
        self.index = CheckpointIndex(config, headers, weight_map, where)
        self.size = self.index.size
        self.cache: Path | None = None
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

    def open(self, shard: str) -> ShardReader:
        return SafetensorsFile(self._directory / shard)

    def rate(self, shards: Sequence[str], *, keep: bool) -> float | None:
        return None

    def _fingerprint(self) -> str:
        stats = [(name, (self._directory / name).stat()) for name in self.index.shards]
        text = repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
        return hashlib.sha256(text.encode()).hexdigest()
