"""Rewrites the 4-bit codes of an installed model in their other layout, losslessly, file by file.

For each file that changes, a new one is written in `conversion/`, a directory inside the model's,
recorded in the journal there with the SHA-256s of its tensors, and moved over the old one. So each
file is complete at every moment, and `half_converted.py` can tell its layout. The manifest comes
last. The disk has to hold one file more, not a second model.

A model that has `conversion/` cannot be loaded, because its manifest names one layout only.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from mixchat import machine
from mixchat.errors import CheckpointError, ResourceError, UsageError
from mixchat.files import rename_durably, temporary_path
from mixchat.progress import Progress, Task, progress_bar
from mixchat.quantities import format_least, format_size
from mixchat.safetensors import SafetensorsFile, SafetensorsWriter, tensor_sha256
from mixchat.weights.care.half_converted import (
    both_layouts,
    conversion_head,
    read_half_converted,
    with_digests,
)
from mixchat.weights.format.blueprint import Blueprint
from mixchat.weights.format.installed_model import installed_blueprint
from mixchat.weights.format.journal import Journal, read_journal
from mixchat.weights.format.manifest import (
    CONVERSION_DIR,
    Manifest,
    check_sizes,
    read_manifest,
    repair_hint,
    write_manifest,
)
from mixchat.weights.make.parts import Part
from mixchat.weights.make.quantize_options import best_layout
from mixchat.weights.matrix.linear import Layout

_SMALL_FILES = 4_000_000  # bytes: journal and manifests


def target_layout(directory: Path, asked: Layout | None) -> Layout:
    """Return the layout to convert to: an unfinished conversion's, the requested one, or the best.

    The best one is what this machine computes fastest. Raises `UsageError` where the layout asked
    for is not that of an unfinished conversion.
    """
    unfinished = read_half_converted(directory)
    if unfinished is None:
        return asked or best_layout()
    if asked not in (None, unfinished.layout):
        raise UsageError(
            f"a conversion of {directory.name!r} to the layout {unfinished.layout} was interrupted",
            hint=f"Finish it first: mixchat convert {directory.name}",
        )
    return unfinished.layout


def convert(directory: Path, layout: Layout, progress: Progress) -> bool:
    """Convert an installed model to this layout, or resume that; False where it has it already.

    Raises `UsageError` where no matrix is in 4 bits, `CheckpointError` where a file is not what the
    manifest says, `ResourceError` where the disk has no room for one file more. After a failure the
    converted files stay converted and the next call resumes; if there are none, the model is as
    before.
    """
    manifest = read_manifest(directory)
    check_sizes(directory, manifest)
    if manifest.quantization["quant_type"] == "none":
        raise UsageError(f"{directory.name!r} has no weights in 4 bits, so no layout to change")
    if manifest.quantization["layout"] == layout and not (directory / CONVERSION_DIR).exists():
        return False
    _Converter(directory, layout, manifest, progress).run()
    return True


class _Converter:
    """One run of a conversion, which may resume that of an earlier one."""

    def __init__(
        self, directory: Path, layout: Layout, manifest: Manifest, progress: Progress
    ) -> None:
        self._directory, self._work = directory, directory / CONVERSION_DIR
        self._manifest, self._progress = manifest, progress
        blueprint = installed_blueprint(directory, manifest)
        self._head = conversion_head(layout)
        self._description = blueprint.in_layout(layout).quantization.description()
        self._files = _files_that_change(blueprint, layout)

    def run(self) -> None:
        """Convert the files that are not converted yet, then write the manifest."""
        made, _ = read_journal(self._work, self._head)
        self._check_disk(set(self._files) - set(made))
        if not self._work.exists():
            self._start()
        journal = Journal(self._work, self._head)
        try:
            self._convert(journal)
        except BaseException:
            if not journal.made:  # no file has changed: the model can be used
                self._finish()
            raise
        write_manifest(
            self._directory,
            replace(with_digests(self._manifest, journal.made), quantization=self._description),
        )
        self._finish()

    def _check_disk(self, todo: set[str]) -> None:
        sizes = self._manifest.sizes
        needed = max((sizes[name] for name in todo), default=0) + _SMALL_FILES
        free = machine.free_disk(self._directory)
        if needed > free:
            raise ResourceError(
                f"not enough disk in {self._directory}: {format_least(needed)} needed, "
                f"{format_size(free)} free",
                hint="Free some space: a conversion needs room for a second copy of one file.",
            )

    def _start(self) -> None:
        """Make the directory appear together with its journal."""
        fresh = temporary_path(self._work)
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        Journal(fresh, self._head)
        rename_durably(fresh, self._work)

    def _finish(self) -> None:
        """Make the directory disappear at once; `gc` removes what a power cut leaves of it."""
        finished = temporary_path(self._work)
        shutil.rmtree(finished, ignore_errors=True)
        rename_durably(self._work, finished)
        shutil.rmtree(finished)

    def _convert(self, journal: Journal) -> None:
        for name in journal.made:
            if (self._work / name).exists():  # the last run ended before it was moved
                self._move(name)
        sizes = {name: sum(old.nbytes for old, _ in both) for name, both in self._files.items()}
        done = sum(sizes.get(name, 0) for name in journal.made)
        what = f"converting {self._directory.name}"
        with progress_bar(self._progress, what, sum(sizes.values()), done) as task:
            for name in self._files:
                if name not in journal.made:
                    journal.add(name, self._rewrite(name, task))
                    journal.save()
                    self._move(name)

    def _move(self, name: str) -> None:
        rename_durably(self._work / name, self._directory / name)

    def _rewrite(self, name: str, task: Task) -> dict[str, str]:
        """Write a file in the new layout; return the SHA-256 in hex of each of its tensors."""
        both, digests = self._files[name], {}
        specs = [spec for old, _ in both for spec in old.tensors]
        with (
            SafetensorsFile(self._directory / name) as file,
            SafetensorsWriter(self._work / name, specs) as writer,
        ):
            if file.header.specs != specs:
                raise CheckpointError(
                    f"{file.path}: its tensors are not those of this model",
                    hint=repair_hint(self._directory),
                )
            for old, new in both:
                for spec, tensor in zip(new.tensors, self._made(file, old, new), strict=True):
                    writer.write(spec.name, tensor)
                    digests[spec.name] = tensor_sha256(tensor)
                task.advance(old.nbytes)
        return digests

    def _made(self, file: SafetensorsFile, old: Part, new: Part) -> list[torch.Tensor]:
        """Read the tensors of a part, compare them with the manifest, and convert them."""
        tensors = [file.read(spec.name) for spec in old.tensors]
        expected = self._manifest.weights[old.file].sha256
        for spec, tensor in zip(old.tensors, tensors, strict=True):
            if tensor_sha256(tensor) != expected[spec.name]:
                raise CheckpointError(
                    f"{file.path}: {spec.name} is damaged (its SHA-256 differs)",
                    hint=repair_hint(self._directory),
                )
        if old.linear is not None and new.linear is not None:
            old.linear.convert(tensors[: len(old.linear.tensors)], new.linear)
        return tensors


def _files_that_change(blueprint: Blueprint, layout: Layout) -> dict[str, list[tuple[Part, Part]]]:
    """Return the parts, before and after, of each file with a matrix that has to be reordered."""
    files: dict[str, list[tuple[Part, Part]]] = {}
    changed = set()
    for old, new in both_layouts(blueprint, layout):
        files.setdefault(old.file, []).append((old, new))
        if old.linear and new.linear and old.linear.packed != new.linear.packed:
            changed.add(old.file)
    return {name: both for name, both in files.items() if name in changed}
