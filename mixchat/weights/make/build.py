"""Builds an installed model out of shards as they come, and resumes an interrupted build.

While one shard is quantized, a thread fetches the next. Tensors of parts that also need a later
shard are spilled to a small file. The journal records what is done.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from concurrent.futures import Future
from contextlib import closing, suppress
from pathlib import Path

import torch

from mixchat.base.errors import HubError
from mixchat.base.files import read_bytes, write_file
from mixchat.base.progress import NoProgress, Progress, Task, in_background, progress_bar
from mixchat.base.safetensors import SafetensorsFile, tensor_sha256
from mixchat.weights.format.blueprint import Blueprint
from mixchat.weights.format.journal import Journal
from mixchat.weights.format.manifest import (
    FORMAT,
    FileRecord,
    Manifest,
    WeightsRecord,
    is_installed,
    restore_manifests,
    unlike,
    write_manifest,
)
from mixchat.weights.format.own_files import COMPANION_FILES, JOURNAL_FILE, SPILL_PREFIX
from mixchat.weights.make.parts import ModelPart, model_parts
from mixchat.weights.make.unfinished import Spill, find_damaged
from mixchat.weights.make.writer import ModelWriter
from mixchat.weights.source.checkpoint import Checkpoint

_CHECKPOINT = "checkpoint"  # its tensors that were read, in the journal
_SAVE_INTERVAL_S = 2.0
_STOP_TIMEOUT_S = 0.3
NO_PROGRESS = NoProgress()


class Build:
    """The build of the model `blueprint` of `checkpoint` in the directory `target`.

    `parts` are left to make, and they need `shards`. Work under another `head` is not resumed.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        target: Path,
        blueprint: Blueprint,
        journal: Journal | None = None,
    ) -> None:
        self.checkpoint, self.target, self.blueprint = checkpoint, target, blueprint
        self.journal = journal or Journal(target)
        self.head: dict[str, object] = {
            "format": FORMAT,
            "source": vars(checkpoint.source),
            "quantization": blueprint.quantization.description(),
            "fingerprint": checkpoint.fingerprint,
        }
        if blueprint.layers:
            self.head["layers"] = [form.description() for form in blueprint.layers]
        self._index = checkpoint.index
        self._find_work()

    def run(self, progress: Progress = NO_PROGRESS, *, ahead: bool = True) -> None:
        """Make what is left. The manifest is written last.

        `ahead`: fetch the next shard while one is quantized, which takes the disk of both. Raises
        `CheckpointError` if a weight is not finite, and what fetching raises.
        """
        self.target.mkdir(parents=True, exist_ok=True)
        companions = _read_companions(self.checkpoint.companions())
        self.journal.start(self.head)
        self._forget_damaged(progress)
        with closing(ModelWriter(self.target, self.blueprint)) as files:
            self._make_all(files, progress, ahead)
            self._finish(files, companions)

    def _find_work(self) -> None:
        recorded = self.journal.made_under(self.head)
        sizes = {name: header.size for name, header in self.blueprint.headers().items()}
        made = {
            name: digests
            for name, digests in recorded.items()
            if name in sizes and _size(self.target / name) == sizes[name]
        }
        self.parts = [
            part
            for part in model_parts(self.blueprint)
            if not all(spec.name in made.get(part.file, {}) for spec in part.tensors)
        ]
        self._spill = Spill(self.target, recorded)
        needed = {name for part in self.parts for name in part.components(self._index)}
        self.shards = sorted({self._index.shard_of(name) for name in needed - self._spill.names})

    def _forget_damaged(self, progress: Progress) -> None:
        lost = find_damaged(self.target, self.blueprint, self.journal.made, progress)
        if count := sum(len(tensors) for tensors in lost.values()):
            self.journal.forget(lost)
            self._find_work()
            tensors = "1 tensor" if count == 1 else f"{count} tensors"
            progress.note(f"damaged since the last run: {tensors}; quantizing again")

    def _make_all(self, files: ModelWriter, progress: Progress, ahead: bool) -> None:
        for shard in self._index.shards:
            if shard not in self.shards:
                self.checkpoint.release(shard)
        left = sum(self._nbytes(part) for part in self.parts)
        whole = sum(self._nbytes(part) for part in model_parts(self.blueprint))
        with (
            closing(_fetched(self.checkpoint, self.shards, progress, ahead)) as fetched,
            progress_bar(progress, "quantizing", whole, whole - left) as task,
        ):
            for shard, path in fetched:
                self._take(shard, path, files, task)
                self.checkpoint.release(shard)

    def _take(self, shard: str, path: Path, files: ModelWriter, task: Task) -> None:
        """Make the parts that can be made now, and spill what the others need."""
        with self._index.open(shard, path) as file:
            if file.header.specs != self._index.header(shard).specs:
                raise HubError(f"{path}: not the tensors that its header listed at first")
            here = self._of_shard(shard)
            saved = time.monotonic()
            later = []
            for part in self.parts:
                if not set(part.components(self._index)) <= here | self._spill.names:
                    later.append(part)
                    continue
                self._make(part, file, files, task)
                if time.monotonic() - saved > _SAVE_INTERVAL_S:
                    self._save(files)
                    saved = time.monotonic()
            needed = {name for part in later for name in part.components(self._index)}
            if new := sorted(needed & here - self._spill.names):
                self.journal.add(*self._spill.write(shard, file, new))
        self._save(files)
        self.parts = later
        self._spill.keep_only(needed)

    def _of_shard(self, shard: str) -> set[str]:
        names = (name for part in self.parts for name in part.components(self._index))
        return {name for name in names if self._index.shard_of(name) == shard}

    def _make(self, part: ModelPart, file: SafetensorsFile, files: ModelWriter, task: Task) -> None:
        read: dict[str, str] = {}

        def reading(name: str) -> torch.Tensor:
            spilled = name in self._spill.names
            tensor = self._spill.read(name) if spilled else file.read(name)
            read[name] = tensor_sha256(tensor)
            return tensor

        digests = files.write(part, part.make(self._index, reading))
        self.journal.add(part.file, digests)
        self.journal.add(_CHECKPOINT, read)
        task.advance(self._nbytes(part))

    def _save(self, files: ModelWriter) -> None:
        files.sync()
        self.journal.save()

    def _nbytes(self, part: ModelPart) -> int:
        return self._index.nbytes(part.components(self._index))

    def _finish(self, files: ModelWriter, companions: dict[str, bytes]) -> None:
        records = {}
        for name, data in companions.items():
            write_file(self.target / name, data)
            records[name] = FileRecord.of(data)
        weights, own = {}, self.blueprint.quantizations()
        whole = self.blueprint.quantization.description()
        for name, size in files.finish().items():
            made = self.journal.made[name]
            order = (spec.name for spec in self.blueprint.files()[name])
            digests = {tensor: made[tensor] for tensor in order}
            weights[name] = WeightsRecord(size, digests, unlike(own[name].description(), whole))
        checkpoint = dict(sorted(self.journal.made[_CHECKPOINT].items()))
        description = self.blueprint.quantization.description()
        source = self.checkpoint.source
        write_manifest(self.target, Manifest(source, description, records, weights, checkpoint))
        finish_interrupted(self.target)


def finish_interrupted(target: Path) -> None:
    """Take the last steps of a build that was killed after it wrote the manifest."""
    if not (target / JOURNAL_FILE).exists() or not is_installed(target):
        return
    restore_manifests(target)
    for path in target.glob(SPILL_PREFIX + "*"):
        path.unlink()
    (target / JOURNAL_FILE).unlink()  # last, because a model that has one is unfinished


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _read_companions(directory: Path) -> dict[str, bytes]:
    paths = {name: directory / name for name in COMPANION_FILES}
    return {name: read_bytes(path) for name, path in paths.items() if path.exists()}


def _fetched(
    checkpoint: Checkpoint, shards: list[str], progress: Progress, ahead: bool
) -> Generator[tuple[str, Path], None, None]:
    """Yield each shard's name and path. With `ahead` a thread fetches the next one."""
    missing = sum(checkpoint.missing(shard) for shard in shards)
    shown = progress if missing else NO_PROGRESS
    title, done = f"fetching {checkpoint.source.repo}", checkpoint.size - missing
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
