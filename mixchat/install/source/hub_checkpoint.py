"""A checkpoint on the hub, fetched shard by shard."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Event, Timer

import torch

from mixchat.base.errors import HubError
from mixchat.base.files import write_file
from mixchat.base.machine import same_disk
from mixchat.base.progress import Task
from mixchat.base.safetensors import Header
from mixchat.install.source import hub
from mixchat.install.source.checkpoint import Checkpoint, ShardReader, Stopped, remove_files
from mixchat.install.source.gguf_checkpoint import write_made
from mixchat.install.source.hub import HubListing
from mixchat.install.source.hub_errors import plain_errors
from mixchat.install.source.remote_file import RemoteFile, cache_dir
from mixchat.install.source.transfer import (
    fetch_and_discard,
    fetch_file,
    is_intact,
    part_path,
    read_range,
    wrong_bytes,
)
from mixchat.weights.format.manifest import Source
from mixchat.weights.format.workspace import SOURCE_DIR

_PROBE_S = 1.0  # to measure the hub's speed


class HubCheckpoint(Checkpoint):
    """The files of one commit.

    A shard is fetched to `source/` in the workspace `work_dir` and removed when it is released.
    With `keep_source` it moves to huggingface_hub's cache and stays. A file in this cache is used
    if its hash is right.
    """

    def __init__(
        self, remote: HubListing, source: Source, work_dir: Path, *, keep_source: bool = False
    ) -> None:
        self.source = source
        self.index = remote.index
        self.size = remote.index.size
        self.fingerprint = remote.commit
        self.cache = cache_dir() if keep_source else None
        self._remote = remote
        self._directory = work_dir / SOURCE_DIR

    def companions(self) -> Path:
        read = self._remote.read
        if metadata_files := self._remote.metadata_files:
            with plain_errors(self._remote.repo_id):
                write_made(self._directory, metadata_files)
            return self._directory
        with plain_errors(self._remote.repo_id, "HF_HOME" if self.cache else "MIXCHAT_HOME"):
            directory = self._directory
            for file in self._remote.small:
                read[file.path] = read.get(file.path) or hub.fetch_small(file)
                path = self._directory / file.name
                path.parent.mkdir(parents=True, exist_ok=True)
                write_file(path, read[file.path])
                if self.cache:
                    directory = file.keep(path, self.source.revision).parent
        return directory

    def close(self) -> None:
        small = [file.path for file in self._remote.small]
        remove_files(self._directory, [*small, *self._remote.metadata_files])

    def missing(self, shard: str) -> int:
        file = self._remote.shards[shard]
        path = self._directory / file.name
        if file.cached() or path.exists():
            return 0
        partial = part_path(path)
        return max(0, file.size - partial.stat().st_size) if partial.exists() else file.size

    def temporary(self, shard: str) -> int:
        file = self._remote.shards[shard]
        stays = self.cache and same_disk(self.cache, self._directory)
        return 0 if stays or file.cached() else file.size

    def fetch(self, shard: str, task: Task, stop: Event) -> Path:
        file = self._remote.shards[shard]
        cached = file.cached()
        size = file.size
        sha256 = str(file.sha256)
        with plain_errors(self._remote.repo_id, "HF_HOME" if self.cache else "MIXCHAT_HOME"):
            # What is good in the cache stays, whatever the hub lists.
            if cached and is_intact(cached, size, sha256, stop):
                return file.keep(cached, self.source.revision) if self.cache else cached
            path = self._directory / file.name
            if not path.exists():
                fetch_file(file.url, path, size, sha256, task, stop)
            elif not is_intact(path, size, sha256, stop):
                path.unlink()
                raise wrong_bytes(file.path)
            return file.keep(path, self.source.revision) if self.cache else path

    def release(self, shard: str) -> None:
        path = self._directory / shard
        path.unlink(missing_ok=True)
        part_path(path).unlink(missing_ok=True)

    def open(self, shard: str) -> ShardReader:
        file = self._remote.shards[shard]
        if cached := file.cached():
            return self.index.open(shard, cached)
        return _RemoteShard(file, self.index.header(shard))

    def rate(self, shards: Sequence[str], *, keep: bool) -> float | None:
        missing = [shard for shard in shards if self.missing(shard)]
        if not missing:
            return None
        shard = missing[0]
        came = _Count()
        stop = Event()
        timer = Timer(_PROBE_S, stop.set)
        start = time.monotonic()
        timer.start()
        try:
            if keep:
                self.fetch(shard, came, stop)
            else:  # only the speed counts
                with suppress(HubError), plain_errors(self._remote.repo_id):
                    fetch_and_discard(self._remote.shards[shard].url, came, stop)
        except Stopped:
            pass
        finally:
            timer.cancel()
        return came.bytes / (time.monotonic() - start) if came.bytes > 0 else None


class _Count:
    bytes = 0

    def advance(self, amount: int) -> None:
        self.bytes += amount

    def close(self) -> None:
        pass


class _RemoteShard:
    def __init__(self, file: RemoteFile, header: Header) -> None:
        self._file = file
        self._header = header

    def read(self, name: str) -> torch.Tensor:
        spec = self._header.spec(name)
        start = self._header.start(name)
        with plain_errors(self._file.repo_id):
            data = read_range(
                self._file.url, start, spec.nbytes, Event(), file_size=self._file.size
            )
        flat = torch.frombuffer(data, dtype=torch.uint8)
        return flat.view(spec.dtype).view(spec.shape)

    def __enter__(self) -> _RemoteShard:
        return self

    def __exit__(self, *_: object) -> None:
        pass
