"""A checkpoint on the hub, fetched shard by shard to the model's directory or to the cache."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Event, Timer

import torch

from mixchat.base.errors import HubError
from mixchat.base.files import write_file
from mixchat.base.lock import Busy
from mixchat.base.progress import Task
from mixchat.base.safetensors import Header
from mixchat.weights.format.manifest import Source
from mixchat.weights.format.workspace import SOURCE_DIR
from mixchat.weights.source import hub
from mixchat.weights.source.checkpoint import Checkpoint, ShardReader, Stopped, remove_files
from mixchat.weights.source.gguf_checkpoint import write_made
from mixchat.weights.source.hub import HubListing, RemoteFile
from mixchat.weights.source.hub_errors import plain_errors
from mixchat.weights.source.transfer import (
    fetch_and_discard,
    fetch_file,
    is_intact,
    part_path,
    read_range,
    wrong_bytes,
)

_PROBE_S = 1.0  # to measure the hub's speed


class HubCheckpoint(Checkpoint):
    """The files of one commit.

    A shard is fetched to `source/` in the workspace `place` and removed when it is released. With
    `keep_source` all are fetched to huggingface_hub's cache and stay. A file in this cache is used
    if its hash is right.
    """

    def __init__(
        self, remote: HubListing, source: Source, place: Path, *, keep_source: bool = False
    ) -> None:
        self.source, self.index = source, remote.index
        self.size, self.fingerprint = remote.index.size, remote.commit
        self.cache = hub.cache_dir() if keep_source else None
        self._remote, self._directory = remote, place / SOURCE_DIR

    def companions(self) -> Path:
        read = self._remote.read
        if metadata_files := self._remote.metadata_files:
            with plain_errors(self._remote.repo_id):
                write_made(self._directory, metadata_files)
            return self._directory
        with plain_errors(self._remote.repo_id, "HF_HOME" if self.cache else "MIXCHAT_HOME"):
            for file in self._remote.small:
                read[file.path] = read.get(file.path) or hub.fetch_small(file)
                path = self._path(file)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_file(path, read[file.path])
                if self.cache:
                    self._linked(file, path)
        if self.cache:
            return hub.snapshot_dir(self._remote.repo_id, self._remote.commit)
        return self._directory

    def close(self) -> None:
        small = [file.path for file in self._remote.small]
        remove_files(self._directory, [*small, *self._remote.metadata_files])

    def missing(self, shard: str) -> int:
        file = self._remote.shards[shard]
        path = _cached(file) or self._path(file)
        if path.exists():
            return 0
        partial = part_path(path)
        return max(0, file.size - partial.stat().st_size) if partial.exists() else file.size

    def temporary(self, shard: str) -> int:
        file = self._remote.shards[shard]
        return 0 if self.cache or _cached(file) else file.size

    def fetch(self, shard: str, task: Task, stop: Event) -> Path:
        file = self._remote.shards[shard]
        cached, size, sha256 = _cached(file), file.size, str(file.sha256)
        in_cache = self.cache is not None or file.blob.exists()
        with plain_errors(self._remote.repo_id, "HF_HOME" if in_cache else "MIXCHAT_HOME"):
            # What is good in the cache stays, whatever the hub lists.
            if cached and is_intact(cached, size, sha256, stop):
                return self._linked(file, cached) if self.cache else cached
            if not in_cache:
                path = self._path(file)
                if not path.exists():
                    fetch_file(file.url, path, size, sha256, task, stop)
                elif not is_intact(path, size, sha256, stop):
                    path.unlink()
                    raise wrong_bytes(file.path)
                return path
            repo = hub.repo_dir(file.repo_id).name
            try:
                with hub.blob_lock(repo, sha256, cancelled=stop.is_set):
                    if not file.blob.exists() or not is_intact(file.blob, size, sha256, stop):
                        fetch_file(file.url, file.blob, size, sha256, task, stop)
            except Busy:
                raise Stopped from None
            return self._linked(file, file.blob)

    def release(self, shard: str) -> None:
        if not self.cache:
            path = self._directory / shard
            path.unlink(missing_ok=True)
            part_path(path).unlink(missing_ok=True)

    def open(self, shard: str) -> ShardReader:
        file = self._remote.shards[shard]
        cached = _cached(file)
        if cached:
            return self.index.open(shard, cached)
        return _RemoteShard(file, self.index.header(shard))

    def rate(self, shards: Sequence[str], *, keep: bool) -> float | None:
        missing = [shard for shard in shards if self.missing(shard)]
        if not missing:
            return None
        shard, came, stop = missing[0], _Count(), Event()
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

    def _path(self, file: RemoteFile) -> Path:
        return file.blob if self.cache else self._directory / file.name

    def _linked(self, file: RemoteFile, path: Path) -> Path:
        """Link snapshots/<commit>/<name> to blobs/<hash>, and return the file's path."""
        pointer = file.pointer
        if not pointer.exists():
            pointer.parent.mkdir(parents=True, exist_ok=True)
            pointer.unlink(missing_ok=True)
            try:
                pointer.symlink_to(os.path.relpath(path, pointer.parent))
            except FileExistsError:
                pass  # another download has made it
            except OSError:  # exFAT has no links. Then huggingface_hub has the file itself there.
                os.replace(path, pointer)
                path = pointer
        hub.write_ref(self._remote.repo_id, self.source.revision, self._remote.commit)
        return pointer if pointer.samefile(path) else path


def _cached(file: RemoteFile) -> Path | None:
    """Return the file in huggingface_hub's cache, if it is there.

    In a cache without links it is known by its size.
    """
    blob = file.blob
    for path in (file.pointer, blob):
        if path.is_file():
            real = path.resolve()
            nameless = real.parent.name != "blobs" and real.stat().st_size == file.size
            if nameless or real == blob.resolve():
                return path
    return None


class _Count:
    bytes = 0

    def advance(self, amount: int) -> None:
        self.bytes += amount

    def close(self) -> None:
        pass


class _RemoteShard:
    def __init__(self, file: RemoteFile, header: Header) -> None:
        self._file, self._header = file, header

    def read(self, name: str) -> torch.Tensor:
        spec, start = self._header.spec(name), self._header.start(name)
        with plain_errors(self._file.repo_id):
            data = read_range(self._file.url, start, spec.nbytes, Event(), of=self._file.size)
        flat = torch.frombuffer(data, dtype=torch.uint8)
        return flat.view(spec.dtype).view(spec.shape)

    def __enter__(self) -> _RemoteShard:
        return self

    def __exit__(self, *_: object) -> None:
        pass
