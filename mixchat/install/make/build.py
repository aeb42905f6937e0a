"""Makes a model in its workspace, and lets it take the place of the installed one at the end.

Each part is made, written and noted in the journal. The next run with the same head makes what is
left. Files that stay as they are become links, which take no disk. The manifest is written last.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch

from mixchat.base.progress import NoProgress, Progress, progress_bar
from mixchat.install.make.parts import ModelPart, model_parts
from mixchat.install.make.unfinished import ModelWriter, find_damaged
from mixchat.weights.format.blueprint import Blueprint
from mixchat.weights.format.journal import Journal
from mixchat.weights.format.manifest import FORMAT, Manifest, Source, WeightsRecord, write_manifest
from mixchat.weights.format.workspace import (
    INPUTS_DIR,
    MODEL_DIR,
    SOURCE_DIR,
    clear,
    real_path,
    swap_in,
    workspace,
)

CHECKPOINT = "checkpoint"  # the journal's record of the checkpoint's tensors that were read
_SAVE_INTERVAL_S = 2.0
NO_PROGRESS = NoProgress()


class Build:
    """The build of the model `blueprint` for the directory `target`.

    `parts` are left to make. `kept` names the files of weights that stay as they are. Work under
    another `head` is not resumed.
    """

    title = "quantizing"

    def __init__(
        self,
        target: Path,
        source: Source,
        blueprint: Blueprint,
        work: Mapping[str, object],
        kept: Collection[str] = (),
    ) -> None:
        self.target = real_path(target)
        self.source = source
        self.blueprint = blueprint
        self.work_dir = workspace(target)
        self.directory = self.work_dir / MODEL_DIR
        self.journal = Journal(self.work_dir)
        self.head: dict[str, object] = {
            "format": FORMAT,
            "source": vars(source),
            "quantization": blueprint.quantization.description(),
            "layers": [form.description() for form in blueprint.layers],
            **work,
        }
        self.headers = {n: h for n, h in blueprint.headers().items() if n not in kept}
        self.all_parts = [part for part in model_parts(blueprint) if part.file in self.headers]
        self.find_work()

    def run(self, progress: Progress = NO_PROGRESS) -> None:
        """Make what is left, and swap the new model in.

        Raises `CheckpointError` if a weight is not finite, and what reading the sources raises.
        """
        self.discard_other_work(progress)
        manifest = self.begin()
        self.journal.start(self.head)
        self._forget_damaged(progress)
        whole, left = (sum(part.nbytes for part in each) for each in (self.all_parts, self.parts))
        with closing(ModelWriter(self.directory, self.headers)) as writer:
            with progress_bar(progress, self.title, whole, whole - left) as task:
                saved = time.monotonic()
                for part, tensors in self.made_parts(writer, progress):
                    self.journal.add(part.file, writer.write(part, tensors))
                    task.advance(part.nbytes)
                    if time.monotonic() - saved > _SAVE_INTERVAL_S:
                        self.save(writer)
                        saved = time.monotonic()
            writer.finish()
            self.save(writer)
        self._finish(manifest)

    def begin(self) -> Manifest:
        """Put all that is not made of parts into `directory`, and return its manifest."""
        raise NotImplementedError

    def made_parts(
        self, writer: ModelWriter, progress: Progress
    ) -> Iterator[tuple[ModelPart, Sequence[torch.Tensor]]]:
        """Yield the `parts`, each with its tensors."""
        raise NotImplementedError

    def find_work(self) -> None:
        """Find the parts that are left to make."""
        recorded = self.journal.made_under(self.head)
        finished = {
            name: recorded[name]
            for name, header in self.headers.items()
            if name in recorded
            and (path := self.directory / name).is_file()
            and path.stat().st_size == header.size
        }
        self.parts = [
            part
            for part in self.all_parts
            if not all(spec.name in finished.get(part.file, {}) for spec in part.tensors)
        ]

    def discard_other_work(self, progress: Progress) -> None:
        """Remove work under another head. Shards of the same weights stay, and so do inputs."""
        head = self.journal.head
        if head == self.head:
            return
        if head is not None:
            progress.note("the unfinished work had other weights or options: starting again")
        # Without a journal, the first shard may have been fetched in part.
        same = head is None or head.get("fingerprint") == self.head.get("fingerprint")
        clear(self.target, keep=(INPUTS_DIR, SOURCE_DIR) if same else (INPUTS_DIR,))
        self.journal = Journal(self.work_dir)

    def save(self, writer: ModelWriter) -> None:
        """Make the written parts and their journal durable."""
        writer.sync()
        self.journal.save()

    def _forget_damaged(self, progress: Progress) -> None:
        lost = find_damaged(self.work_dir, self.headers, self.journal.made, progress)
        if count := sum(len(tensors) for tensors in lost.values()):
            self.journal.forget(lost)
            self.find_work()
            tensors = "1 tensor" if count == 1 else f"{count} tensors"
            progress.note(f"damaged since the last run: {tensors}; making again")

    def _finish(self, manifest: Manifest) -> None:
        weights = manifest.weights
        own = self.blueprint.descriptions()
        for name, header in self.headers.items():
            recorded = self.journal.made[name]
            digests = {spec.name: recorded[spec.name] for spec in header.specs}
            weights[name] = WeightsRecord(header.size, digests, own[name])
        checkpoint = manifest.checkpoint | self.journal.made.get(CHECKPOINT, {})
        finished = replace(
            manifest,
            quantization=self.blueprint.description(),
            weights={name: weights[name] for name in own},
            checkpoint=dict(sorted(checkpoint.items())),
        )
        write_manifest(self.directory, finished)
        swap_in(self.target)
