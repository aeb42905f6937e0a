"""Rewrites an installed model in another form, file by file.

The codes get their other layout, losslessly; or attention and head are rounded from 16 bits to 8,
as a download rounds them; or the experts are made anew from the checkpoint. For each file that
changes, a new one is written in `conversion/`, a directory inside the model's, recorded in the
journal there with the SHA-256s of its tensors, and moved over the old one. So each file is complete
at every moment, and `half_converted.py` can tell its form. The manifest comes last. The disk has to
hold one file more, not a second model.

A model that has `conversion/` cannot be loaded, because its manifest names one form only.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from mixchat import machine
from mixchat.errors import CheckpointError, ResourceError, UsageError
from mixchat.files import rename_durably, temporary_path
from mixchat.options import DenseBits
from mixchat.progress import Progress, Task, progress_bar
from mixchat.quantities import format_least, format_size
from mixchat.safetensors import SafetensorsFile, SafetensorsWriter, tensor_sha256
from mixchat.weights.care.half_converted import (
    conversion_head,
    manifest_of_files,
    new_sizes,
    read_half_converted,
    with_digests,
)
from mixchat.weights.format.blueprint import SHARED_FILE, Blueprint, Quantization
from mixchat.weights.format.file_layout import file_layouts
from mixchat.weights.format.installed_model import installed_blueprint
from mixchat.weights.format.journal import Journal, read_journal
from mixchat.weights.format.manifest import (
    CONVERSION_DIR,
    FORMAT,
    INPUTS_DIR,
    Manifest,
    check_sizes,
    finishing_command,
    read_manifest,
    repair_hint,
    write_manifest,
)
from mixchat.weights.make.parts import Part, parts
from mixchat.weights.make.quantize_options import best_layout, bits_of, dense_type
from mixchat.weights.matrix.linear import Layout, QuantType

_SMALL_FILES = 4_000_000  # bytes: journal and manifests


Remake = Callable[[Part], list[torch.Tensor]]  # returns an expert's part, from the checkpoint


def find_target(
    directory: Path, layout: Layout | None, bits: DenseBits, *, calibrated: bool = False
) -> Quantization:
    """Return the form to convert to: an unfinished conversion's, or the requested one.

    With neither a layout nor bits nor `calibrated`, it has the layout that this machine computes
    fastest. Raises `UsageError` where no matrix is in 4 bits, for what a conversion cannot give,
    and for another form than that of an unfinished conversion.
    """
    manifest = read_manifest(directory)
    now = Quantization.from_description(manifest.quantization)
    if now.quant_type == "none":
        raise UsageError(
            f"{directory.name!r} has no experts in 3 or 4 bits: there is nothing to convert"
        )
    unfinished = read_half_converted(directory, manifest)
    if unfinished is not None:
        return _same(directory, unfinished.target, layout, bits, calibrated)
    if not any(bits) and not calibrated:
        layout = layout or best_layout()
    if calibrated and now.scales == "given":
        raise UsageError(f"the checkpoint of {directory.name!r} is in 4 bits: it has no other form")
    return replace(
        now,
        layout=layout or now.layout,
        attention=_rounded(directory, "attention", now.attention, bits.attention),
        head=_rounded(directory, "head", now.head, bits.head),
        scales="calibrated" if calibrated else now.scales,
    )


def _rounded(directory: Path, part: str, stored: QuantType, bits: int | None) -> QuantType:
    """Return the type that a part gets. Raises `UsageError` where a conversion cannot give it."""
    has = bits_of(stored)
    if bits in (None, has):
        return stored
    if (has, bits) == (16, 8):
        return "int8"
    raise UsageError(
        f"the {part} of {directory.name!r} has {has} bits: only 16 can be converted, and only to 8",
        hint="Download the model again, under another name (--name) or after 'mixchat rm'.",
    )


def _same(
    directory: Path,
    target: Quantization,
    layout: Layout | None,
    bits: DenseBits,
    calibrated: bool,
) -> Quantization:
    """Return the form of the unfinished conversion. Raises `UsageError` if another is requested."""

    def type_of(bits: int | None, stored: QuantType) -> QuantType:
        return dense_type(bits, target.quant_type) if bits else stored

    unlike = calibrated != (directory / INPUTS_DIR).exists()
    requested = replace(
        target,
        layout=layout or target.layout,
        attention=type_of(bits.attention, target.attention),
        head=type_of(bits.head, target.head),
        scales="calibrated" if calibrated else target.scales,
    )
    if unlike or requested != target:
        form = (
            f"layout {target.layout}, attention {target.attention}, head {target.head}, "
            f"scales {target.scales}"
        )
        raise UsageError(
            f"a conversion of {directory.name!r} was interrupted: to {form}",
            hint=f"Finish it first: {finishing_command(directory)}",
        )
    return target


def convert(
    directory: Path,
    target: Quantization,
    progress: Progress,
    remake: Remake | None = None,
) -> bool:
    """Convert an installed model to what `find_target` returned; False where it is so already.

    `remake` makes the experts anew, where their scales change. Resumes an unfinished conversion.
    Raises `CheckpointError` where a file is not what the manifest says, `ResourceError` where the
    disk has no room for one file more. After a failure the converted files stay converted and the
    next call resumes; if there are none, the model is as before.
    """
    manifest = read_manifest(directory)
    files = manifest_of_files(directory, manifest)
    check_sizes(directory, files)
    changes = manifest.quantization != target.description() or remake is not None
    if not changes and not (directory / CONVERSION_DIR).exists():
        return False
    old = installed_blueprint(directory, files)
    _Converter(directory, manifest, old, target, progress, remake).run()
    return True


class _Converter:
    """One run of a conversion, which may resume that of an earlier one.

    old: the model in the form that its files have now.
    """

    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        old: Blueprint,
        target: Quantization,
        progress: Progress,
        remake: Remake | None,
    ) -> None:
        self._remake = remake
        self._directory, self._work = directory, directory / CONVERSION_DIR
        self._manifest, self._progress = manifest, progress
        self._old, self._new = old, replace(old, quantization=target)
        self._sizes = {name: layout.size for name, layout in file_layouts(self._new).items()}
        unfinished = read_half_converted(directory, manifest)
        fresh = conversion_head(target, self._sizes[SHARED_FILE])
        self._head = unfinished.head if unfinished else fresh
        self._files = _files_that_change(old, self._new, remake is not None)

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
        write_manifest(self._directory, self._converted(journal))
        self._finish()

    def _converted(self, journal: Journal) -> Manifest:
        """Return the manifest of the converted model."""
        before, after = self._manifest.quantization, self._new.quantization.description()
        same = all(before[part] == after[part] for part in ("attention", "head"))
        return replace(
            with_digests(self._manifest, journal.made, new_sizes(self._head)),
            quantization=after,
            format=self._manifest.format if same else FORMAT,
        )

    def _check_disk(self, todo: set[str]) -> None:
        needed = max((self._sizes[name] for name in todo), default=0) + _SMALL_FILES
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
        """Write a file in the new form; return the SHA-256 in hex of each of its tensors."""
        digests: dict[str, str] = {}
        with (
            SafetensorsFile(self._directory / name) as file,
            SafetensorsWriter(self._work / name, self._new.files()[name]) as writer,
        ):
            if file.header.specs != self._old.files()[name]:
                raise CheckpointError(
                    f"{file.path}: its tensors are not those of this model",
                    hint=repair_hint(self._directory),
                )
            for old, new in self._files[name]:
                if self._remake is not None and new.expert is not None:
                    made = self._remake(new)
                else:
                    made = self._made(file, old, new)
                for spec, tensor in zip(new.tensors, made, strict=True):
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
        if new.linear is None:
            return tensors
        if old.linear is None or old.linear.quant_type != new.linear.quant_type:
            return new.linear.encode(tensors[0])
        old.linear.convert(tensors[: len(old.linear.tensors)], new.linear)
        return tensors


def _files_that_change(
    old: Blueprint, new: Blueprint, experts: bool
) -> dict[str, list[tuple[Part, Part]]]:
    """Return the parts, before and after, of each file with a matrix that changes.

    experts: all of them change.
    """
    files: dict[str, list[tuple[Part, Part]]] = {}
    changed = set()
    for before, after in _both_forms(old, new):
        files.setdefault(after.file, []).append((before, after))
        same = before.tensors == after.tensors and _packed(before) == _packed(after)
        if not same or (experts and after.expert is not None):
            changed.add(after.file)
    return {name: both for name, both in files.items() if name in changed}


def _both_forms(old: Blueprint, new: Blueprint) -> Iterator[tuple[Part, Part]]:
    """Yield each part of the new form behind the part of the old one that it is made of.

    A head that gets a matrix of its own is made of the embedding.
    """
    before = {(part.sources, part.linear is None): part for part in parts(old)}
    for after in parts(new):
        same = before.get((after.sources, after.linear is None))
        yield same or before[after.sources, True], after


def _packed(part: Part) -> bool:
    return part.linear is not None and part.linear.packed
