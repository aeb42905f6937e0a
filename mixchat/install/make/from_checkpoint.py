"""Makes a model of a checkpoint's shards as they come.

While one shard is quantized, a thread fetches the next. Tensors of parts that also need a later
shard are spilled to a small file.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing, suppress
from pathlib import Path

import torch

from mixchat.base.errors import HubError
from mixchat.base.files import read_bytes, write_file
from mixchat.base.progress import Progress, in_background, progress_bar
from mixchat.base.safetensors import SafetensorsFile, tensor_sha256
from mixchat.install.make.build import CHECKPOINT, NO_PROGRESS, Build
from mixchat.install.make.parts import ModelPart
from mixchat.install.make.unfinished import ModelWriter, Spill
from mixchat.install.source.checkpoint import Checkpoint
from mixchat.weights.format.blueprint import Blueprint
from mixchat.weights.format.manifest import FileRecord, Manifest
from mixchat.weights.format.own_files import COMPANION_FILES

_STOP_TIMEOUT_S = 0.3


class CheckpointBuild(Build):
    """The build of a model from `checkpoint`, with none installed. It still needs `shards`.

    `ahead`: fetch a shard while one is quantized. The disk holds both.
    """

    ahead = True

    def __init__(self, checkpoint: Checkpoint, target: Path, blueprint: Blueprint) -> None:
        self.checkpoint = checkpoint
        self._index = checkpoint.index
        work = {"base": None, "fingerprint": checkpoint.fingerprint}
        super().__init__(target, checkpoint.source, blueprint, work)

    def find_work(self) -> None:
        super().find_work()
        self._spill = Spill(self.work_dir, self.journal.made_under(self.head))
        needed = {name for part in self.parts for name in part.components(self._index)}
        self.shards = sorted({self._index.shard_of(name) for name in needed - self._spill.names})

    def begin(self) -> Manifest:
        records = {}
        companions = self.checkpoint.companions()
        self.directory.mkdir(parents=True, exist_ok=True)  # only once the small files are fetched
        for name in COMPANION_FILES:
            if (companions / name).exists():
                data = read_bytes(companions / name)
                write_file(self.directory / name, data)
                records[name] = FileRecord.of(data)
        return Manifest(self.source, {}, records, {})

    def made_parts(
        self, writer: ModelWriter, progress: Progress
    ) -> Iterator[tuple[ModelPart, Sequence[torch.Tensor]]]:
        for shard in self._index.shards:
            if shard not in self.shards:
                self.checkpoint.release(shard)
        with closing(_fetched(self.checkpoint, self.shards, progress, self.ahead)) as fetched:
            for shard, path in fetched:
                yield from self._parts_of(shard, path, writer)
                self.checkpoint.release(shard)

    def _parts_of(
        self, shard: str, path: Path, writer: ModelWriter
    ) -> Iterator[tuple[ModelPart, Sequence[torch.Tensor]]]:
        """Make the parts that can be made now, and spill what the others need."""
        with self._index.open(shard, path) as file:
            if file.header.specs != self._index.header(shard).specs:
                raise HubError(f"{path}: not the tensors that its header listed at first")
            names = (name for part in self.parts for name in part.components(self._index))
            here = {name for name in names if self._index.shard_of(name) == shard}
            later = []
            for part in self.parts:
                if set(part.components(self._index)) <= here | self._spill.names:
                    yield part, self._make(part, file)
                else:
                    later.append(part)
            needed = {name for part in later for name in part.components(self._index)}
            if new := sorted(needed & here - self._spill.names):
                self.journal.add(*self._spill.write(shard, file, new))
        self.save(writer)  # durable before the shard is released
        self.parts = later
        self._spill.keep_only(needed)

    def _make(self, part: ModelPart, file: SafetensorsFile) -> list[torch.Tensor]:
        read: dict[str, str] = {}

        def reading(name: str) -> torch.Tensor:
            spilled = name in self._spill.names
            tensor = self._spill.read(name) if spilled else file.read(name)
            read[name] = tensor_sha256(tensor)
            return tensor

        tensors = part.make(self._index, reading)
        self.journal.add(CHECKPOINT, read)
        return tensors


def _fetched(
    checkpoint: Checkpoint, shards: list[str], progress: Progress, ahead: bool
) -> Generator[tuple[str, Path], None, None]:
    """Yield each shard's name and path. With `ahead` a thread fetches the next one."""
    missing = sum(checkpoint.missing(shard) for shard in shards)
    shown = progress if missing else NO_PROGRESS
    title = f"fetching {checkpoint.source.repo}"
    done = checkpoint.size - missing
    stop = threading.Event()
    with progress_bar(shown, title, checkpoint.size, done) as task:
        coming: Future[Path] | None = None
        try:
            for number, shard in enumerate(shards):
                coming = coming or in_background(checkpoint.fetch, shard, task, stop)
                path = coming.result()
                following = shards[number + 1 : number + 2] if ahead else []
                coming = (
                    in_background(checkpoint.fetch, *following, task, stop) if following else None
                )
                yield shard, path
        finally:
            stop.set()
            if coming is not None:
                with suppress(Exception):
                    coming.result(_STOP_TIMEOUT_S)
