"""Rewrites the 4-bit codes of a kept model in their other layout, losslessly, a file at a time.

Each file that changes is written anew in `conversion/`, a directory inside the model's, noted in
the journal there with the SHA-256 of its tensors, and moved over the old one. So at every moment
each file is whole and its layout known: one that the journal names has the new layout, unless it
still lies in `conversion/`, from where it only has to be moved. The manifest comes last. The disk
has to hold one file more, not a second model.

While `conversion/` is there the model is not loaded, for its manifest names one layout only; to
`verify` and `repair` this module says what each file is.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mixchat import machine
from mixchat.errors import CheckpointError, ResourceError, UsageError
from mixchat.files import rename_durably, temporary_path
from mixchat.progress import Progress, Task, running
from mixchat.quantities import format_least, format_size
from mixchat.safetensors import SafetensorsFile, SafetensorsWriter, tensor_sha256
from mixchat.weights.format.blueprint import Blueprint
from mixchat.weights.format.installed_model import installed_blueprint
from mixchat.weights.format.journal import Journal, read_head, read_journal
from mixchat.weights.format.manifest import (
    CONVERSION_DIR,
    FORMAT,
    Manifest,
    check_sizes,
    read_manifest,
    repair_hint,
    write_manifest,
)
from mixchat.weights.make.parts import Part, parts
from mixchat.weights.make.quantize import best_layout
from mixchat.weights.matrix.linear import Layout

_SMALL_FILES = 4_000_000  # bytes: journal and manifests
_LAYOUTS: tuple[Layout, ...] = ("bitsandbytes", "cpu-packed")


@dataclass(frozen=True)
class Begun:
    """A conversion that was cut off: where to, and the SHA-256s of the tensors that are there."""

    layout: Layout
    converted: dict[str, dict[str, str]]


def begun(directory: Path) -> Begun | None:
    """What has been converted in a model's directory; None where nothing is half converted.

    Raises `CheckpointError` where the journal that says it cannot be read.
    """
    work = directory / CONVERSION_DIR
    if not work.exists():
        return None
    head = read_head(work) or {}
    for layout in _LAYOUTS:
        if head == _head(layout):
            made, _ = read_journal(work, head)
            return Begun(layout, {name: made[name] for name in made if not (work / name).exists()})
    raise CheckpointError(
        f"{work}: the record of a conversion is damaged",
        hint="Remove the model (mixchat rm) and download it again.",
    )


def manifest_as_it_lies(directory: Path, manifest: Manifest) -> Manifest:
    """The manifest with the SHA-256s of those files, too, that a conversion has been at."""
    half = begun(directory)
    return _with_digests(manifest, half.converted) if half else manifest


def parts_as_they_lie(directory: Path, blueprint: Blueprint) -> Iterator[Part]:
    """The parts of a model, each in the layout that its file has now."""
    half = begun(directory)
    if half is None:
        yield from parts(blueprint)
        return
    for old, new in _both(blueprint, half.layout):
        yield new if new.file in half.converted else old


def layout_to_take(directory: Path, asked: Layout | None) -> Layout:
    """The layout to convert to: what was begun, what is asked for, or the best on this machine.

    Raises `UsageError` where another one than that asked for was begun.
    """
    half = begun(directory)
    if half is None:
        return asked or best_layout()
    if asked not in (None, half.layout):
        raise UsageError(
            f"a conversion of {directory.name!r} to the layout {half.layout} was cut off",
            hint=f"Finish it first: mixchat convert {directory.name}",
        )
    return half.layout


def convert(directory: Path, layout: Layout, progress: Progress) -> bool:
    """Give a kept model this layout, or go on doing so; False where it has it already.

    Raises `UsageError` where nothing is in 4 bits, `CheckpointError` where what is read is not what
    the manifest says, `ResourceError` where the disk has no room for one file more. What was
    converted before a failure stays so, and the next call goes on; where nothing was, the model is
    as before.
    """
    manifest = read_manifest(directory)
    check_sizes(directory, manifest)
    if manifest.quantization["quant_type"] == "none":
        raise UsageError(
            f"nothing of {directory.name!r} is in 4 bits: there is no layout to change"
        )
    if manifest.quantization["layout"] == layout and not (directory / CONVERSION_DIR).exists():
        return False
    _Conversion(directory, layout, manifest, progress).run()
    return True


class _Conversion:
    """One run of a conversion, which may have been begun by another."""

    def __init__(
        self, directory: Path, layout: Layout, manifest: Manifest, progress: Progress
    ) -> None:
        self._directory, self._work = directory, directory / CONVERSION_DIR
        self._manifest, self._progress = manifest, progress
        blueprint = installed_blueprint(directory, manifest)
        self._head = _head(layout)
        self._description = blueprint.in_layout(layout).quantization.description()
        self._files = _files_that_change(blueprint, layout)

    def run(self) -> None:
        """Convert what is not converted yet; at the end the model is whole."""
        made, _ = read_journal(self._work, self._head)
        self._check_disk(set(self._files) - set(made))
        if not self._work.exists():
            self._begin()
        journal = Journal(self._work, self._head)
        try:
            self._convert(journal)
        except BaseException:
            if not journal.made:  # nothing has been touched: the model may be used
                self._end()
            raise
        write_manifest(
            self._directory,
            replace(_with_digests(self._manifest, journal.made), quantization=self._description),
        )
        self._end()

    def _check_disk(self, todo: set[str]) -> None:
        sizes = self._manifest.sizes
        needed = max((sizes[name] for name in todo), default=0) + _SMALL_FILES
        free = machine.free_disk(self._directory)
        if needed > free:
            raise ResourceError(
                f"not enough disk in {self._directory}: {format_least(needed)} needed, "
                f"{format_size(free)} free",
                hint="Free some space: the largest file is there twice for a while.",
            )

    def _begin(self) -> None:
        """Make the directory appear together with its journal."""
        fresh = temporary_path(self._work)
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir()
        Journal(fresh, self._head)
        rename_durably(fresh, self._work)

    def _end(self) -> None:
        """Make it disappear at once; of what is left after a power cut, `gc` knows the name."""
        finished = temporary_path(self._work)
        shutil.rmtree(finished, ignore_errors=True)
        rename_durably(self._work, finished)
        shutil.rmtree(finished)

    def _convert(self, journal: Journal) -> None:
        for name in journal.made:
            if (self._work / name).exists():  # cut off before it was moved
                self._move(name)
        sizes = {name: sum(old.nbytes for old, _ in both) for name, both in self._files.items()}
        done = sum(sizes.get(name, 0) for name in journal.made)
        what = f"converting {self._directory.name}"
        with running(self._progress, what, sum(sizes.values()), done) as task:
            for name in self._files:
                if name not in journal.made:
                    journal.add(name, self._rewrite(name, task))
                    journal.save()
                    self._move(name)

    def _move(self, name: str) -> None:
        rename_durably(self._work / name, self._directory / name)

    def _rewrite(self, name: str, task: Task) -> dict[str, str]:
        """Write a file anew, in the new layout; the SHA-256 in hex of each of its tensors."""
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
        """The tensors of a part, checked and converted."""
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


def _head(layout: Layout) -> dict[str, Any]:
    """The first line of a conversion's journal."""
    return {"format": FORMAT, "layout": layout}


def _both(blueprint: Blueprint, layout: Layout) -> Iterator[tuple[Part, Part]]:
    """Each part of a model as it is, and as it is in another layout."""
    return zip(parts(blueprint), parts(blueprint.in_layout(layout)), strict=True)


def _files_that_change(blueprint: Blueprint, layout: Layout) -> dict[str, list[tuple[Part, Part]]]:
    """The parts, before and after, of each file with a matrix whose codes have to be reordered."""
    files: dict[str, list[tuple[Part, Part]]] = {}
    changed = set()
    for old, new in _both(blueprint, layout):
        files.setdefault(old.file, []).append((old, new))
        if old.linear and new.linear and old.linear.packed != new.linear.packed:
            changed.add(old.file)
    return {name: both for name, both in files.items() if name in changed}


def _with_digests(manifest: Manifest, digests: dict[str, dict[str, str]]) -> Manifest:
    """The manifest with other SHA-256s for the tensors of these files."""
    weights = {
        name: replace(record, sha256=digests.get(name, record.sha256))
        for name, record in manifest.weights.items()
    }
    return replace(manifest, weights=weights)
