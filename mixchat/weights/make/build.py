"""Builds an installed model out of shards as they come, and resumes where it was cut off.

While one shard is quantized, a thread fetches the next; a shard is released as soon as all of its
tensors have been used. Tensors of parts that also need a later shard are spilled to a small file.
The journal records what is done, so that at most a few seconds of quantizing are lost. Before work
continues, the files are checked against it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from concurrent.futures import Future
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from mixchat.base.errors import HubError
from mixchat.base.files import read_bytes, write_file
from mixchat.base.progress import NoProgress, Progress, Task, in_background, progress_bar
from mixchat.base.safetensors import SafetensorsFile, tensor_sha256
from mixchat.weights.format.blueprint import Blueprint
from mixchat.weights.format.file_layout import file_layouts
from mixchat.weights.format.journal import JOURNAL_FILE, Journal, read_journal
from mixchat.weights.format.manifest import (
    FORMAT,
    FileRecord,
    Manifest,
    WeightsRecord,
    is_installed,
    restore_manifests,
    write_manifest,
)
from mixchat.weights.make.parts import Part, parts
from mixchat.weights.make.recheck import find_damaged
from mixchat.weights.make.spill import SPILL_PREFIX, Spill
from mixchat.weights.make.writer import ModelWriter
from mixchat.weights.source.checkpoint import Checkpoint
from mixchat.weights.source.checkpoint_files import COMPANION_FILES

_CHECKPOINT = "checkpoint"  # in the journal: the tensors that were read of it
_SECONDS_BETWEEN_SAVES = 2.0
_SECONDS_TO_STOP = 0.3
NO_PROGRESS = NoProgress()


def build(
    checkpoint: Checkpoint,
    target: Path,
    blueprint: Blueprint,
    progress: Progress = NO_PROGRESS,
    *,
    ahead: bool = True,
) -> None:
    """Build the model `blueprint` of `checkpoint` in the directory `target`, or resume building it.

    `ahead`: fetch the next shard while one is quantized, which takes the disk of both.
    The manifest is written last: until then the model does not count as installed. Raises
    `CheckpointError` where the checkpoint is not what its headers said, or not finite, and what
    fetching raises.
    """
    target.mkdir(parents=True, exist_ok=True)
    _Build(checkpoint, target, blueprint, progress, ahead).run()


def journal_head(checkpoint: Checkpoint, blueprint: Blueprint) -> dict[str, object]:
    """Return the first line of the journal; work under another first line is not resumed."""
    return {
        "format": FORMAT,
        "source": vars(checkpoint.source),
        "quantization": blueprint.quantization.description(),
        "fingerprint": checkpoint.fingerprint,
    }


def finish_interrupted(target: Path) -> None:
    """Take the last steps of a build whose process was killed after it wrote the manifest.

    The journal is removed last: with it, a model is unfinished.
    """
    if not (target / JOURNAL_FILE).exists() or not is_installed(target):
        return
    restore_manifests(target)
    for path in target.glob(SPILL_PREFIX + "*"):
        path.unlink()
    (target / JOURNAL_FILE).unlink()


@dataclass(frozen=True)
class Remaining:
    """The parts of a model that are not made yet, the shards they need, in order, and the spill."""

    parts: list[Part]
    shards: list[str]
    spill: Spill


def find_remaining(checkpoint: Checkpoint, target: Path, blueprint: Blueprint) -> Remaining:
    """Return what `build` has left to do in `target`. Changes nothing there."""
    recorded, _ = read_journal(target, journal_head(checkpoint, blueprint))
    made = _with_their_size(recorded, target, blueprint)
    todo = [
        part
        for part in parts(blueprint)
        if not all(spec.name in made.get(part.file, {}) for spec in part.tensors)
    ]
    names = {name for part in todo for name in part.components(checkpoint.index)}
    spill = Spill(target, recorded)
    shards = {checkpoint.index.shard_of(name) for name in names - spill.names}
    return Remaining(todo, sorted(shards), spill)


def _with_their_size(
    made: dict[str, dict[str, str]], target: Path, blueprint: Blueprint
) -> dict[str, dict[str, str]]:
    """Return the journal's entries of the files that have their full size."""
    sizes = {name: layout.size for name, layout in file_layouts(blueprint).items()}
    return {
        name: digests
        for name, digests in made.items()
        if name in sizes and _size(target / name) == sizes[name]
    }


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


class _Build:
    """The build of one model in `target`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        target: Path,
        blueprint: Blueprint,
        progress: Progress,
        ahead: bool,
    ) -> None:
        self._checkpoint, self._index, self._target = checkpoint, checkpoint.index, target
        self._blueprint, self._progress, self._ahead = blueprint, progress, ahead
        self._companions = _read_companions(checkpoint.companions())
        self._journal = Journal(target, journal_head(checkpoint, blueprint))
        self._forget_damaged()
        left = find_remaining(checkpoint, target, blueprint)
        self._todo, self._shards, self._spill = left.parts, left.shards, left.spill

    def run(self) -> None:
        with closing(ModelWriter(self._target, self._blueprint)) as files:
            self._make_all(files)
            self._finish(files)

    def _forget_damaged(self) -> None:
        lost = find_damaged(self._target, self._blueprint, self._journal.made, self._progress)
        self._journal.forget(lost)
        if count := sum(len(tensors) for tensors in lost.values()):
            tensors = "1 tensor" if count == 1 else f"{count} tensors"
            self._progress.note(f"damaged since the last run: {tensors}; quantizing again")

    def _make_all(self, files: ModelWriter) -> None:
        for shard in self._index.shards:
            if shard not in self._shards:
                self._checkpoint.release(shard)
        left = sum(self._nbytes(part) for part in self._todo)
        whole = sum(self._nbytes(part) for part in parts(self._blueprint))
        with (
            closing(
                _fetched(self._checkpoint, self._shards, self._progress, self._ahead)
            ) as fetched,
            progress_bar(self._progress, "quantizing", whole, whole - left) as task,
        ):
            for shard, path in fetched:
                self._take(shard, path, files, task)
                self._checkpoint.release(shard)

    def _take(self, shard: str, path: Path, files: ModelWriter, task: Task) -> None:
        """Make the parts that can be made now, and spill what the others need of this shard."""
        with SafetensorsFile(path) as file:
            if file.header.specs != self._index.header(shard).specs:
                raise HubError(f"{path}: not the tensors that its header listed at first")
            here = {spec.name for spec in file.header.specs} & self._of_shard(shard)
            saved = time.monotonic()
            later = []
            for part in self._todo:
                if not set(part.components(self._index)) <= here | self._spill.names:
                    later.append(part)
                    continue
                self._make(part, file, files, task)
                if time.monotonic() - saved > _SECONDS_BETWEEN_SAVES:
                    self._save(files)
                    saved = time.monotonic()
            needed = {name for part in later for name in part.components(self._index)}
            if new := sorted(needed & here - self._spill.names):
                self._journal.add(*self._spill.write(shard, file, new))
        self._save(files)
        self._todo = later
        self._spill.keep_only(needed)

    def _of_shard(self, shard: str) -> set[str]:
        names = (name for part in self._todo for name in part.components(self._index))
        return {name for name in names if self._index.shard_of(name) == shard}

    def _make(self, part: Part, file: SafetensorsFile, files: ModelWriter, task: Task) -> None:
        read: dict[str, str] = {}

        def reading(name: str) -> torch.Tensor:
            spilled = name in self._spill.names
            tensor = self._spill.read(name) if spilled else file.read(name)
            read[name] = tensor_sha256(tensor)
            return tensor

        digests = files.write(part, part.make(self._index, reading))
        self._journal.add(part.file, digests)
        self._journal.add(_CHECKPOINT, read)
        task.advance(self._nbytes(part))

    def _save(self, files: ModelWriter) -> None:
        files.sync()
        self._journal.save()

    def _nbytes(self, part: Part) -> int:
        return self._index.nbytes(part.components(self._index))

    def _finish(self, files: ModelWriter) -> None:
        records = {}
        for name, data in self._companions.items():
            write_file(self._target / name, data)
            records[name] = FileRecord.of(data)
        weights = {}
        for name, size in files.finish().items():
            made = self._journal.made[name]
            order = (spec.name for spec in self._blueprint.files()[name])
            weights[name] = WeightsRecord(size, {tensor: made[tensor] for tensor in order})
        read = self._journal.made[_CHECKPOINT]
        description = self._blueprint.quantization.description()
        checkpoint = {name: read[name] for name in sorted(read)}
        manifest = Manifest(self._checkpoint.source, description, records, weights, checkpoint)
        write_manifest(self._target, manifest)
        finish_interrupted(self._target)


def _read_companions(directory: Path) -> dict[str, bytes]:
    """Read the small files now: hours later they may be gone, or the hub out of reach."""
    paths = {name: directory / name for name in COMPANION_FILES}
    return {name: read_bytes(path) for name, path in paths.items() if path.exists()}


def _fetched(
    checkpoint: Checkpoint, shards: list[str], progress: Progress, ahead: bool
) -> Generator[tuple[str, Path], None, None]:
    """Yield each shard's name and path; `ahead`: while a thread fetches the next one."""
    missing = sum(checkpoint.missing(shard) for shard in shards)
    shown = progress if missing else NO_PROGRESS
    what, done = f"fetching {checkpoint.source.repo}", checkpoint.size - missing
    stop = threading.Event()
    with progress_bar(shown, what, checkpoint.size, done) as task:
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
                    coming.result(_SECONDS_TO_STOP)
