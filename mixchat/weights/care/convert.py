"""Converts an installed model, file by file.

The model can be used at every moment, with converted and old files mixed (`model_files.py`). The
disk has to hold one file more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import torch

from mixchat.base import machine
from mixchat.base.errors import CheckpointError, ResourceError, UsageError
from mixchat.base.options import DenseBits
from mixchat.base.progress import Progress, Task, progress_bar
from mixchat.base.quantities import format_least, format_size
from mixchat.base.safetensors import SafetensorsFile, SafetensorsWriter, tensor_sha256
from mixchat.weights.format.blueprint import (
    EMBEDDING,
    SHARED_FILE,
    Blueprint,
    Form,
    Quantization,
    experts_file,
)
from mixchat.weights.format.installed_model import installed_blueprint
from mixchat.weights.format.manifest import (
    Manifest,
    WeightsRecord,
    read_manifest,
    repair_hint,
    unlike,
    write_manifest,
)
from mixchat.weights.format.model_files import check_files, finish_replacement, replace_file
from mixchat.weights.format.own_files import NEW_SUFFIX
from mixchat.weights.make.calibrator import Calibrator, ExpertInputs, is_calibrated
from mixchat.weights.make.parts import ModelPart, model_parts
from mixchat.weights.make.quantize_options import best_layout
from mixchat.weights.matrix.linear import TYPES, Layout, Scales, type_of_bits
from mixchat.weights.matrix.quant_type import QuantType

_MANIFESTS_BYTES = 4_000_000
_BITS = (8, 6, 5)  # to which 16 can be rounded


def find_target(
    directory: Path, layout: Layout | None, bits: DenseBits, *, calibrated: bool = False
) -> Quantization:
    """Return the quantization to convert to, by default the layout that is fastest here.

    Raises `UsageError` if a conversion cannot make it.
    """
    now = Quantization.from_description(read_manifest(directory).quantization)
    if now.quant_type == "none":
        raise UsageError(
            f"{directory.name!r} has no experts in 3 or 4 bits: there is nothing to convert"
        )
    if not any(bits) and not calibrated:
        layout = layout or best_layout()
    if calibrated and now.scales == "given":
        raise UsageError(
            f"the experts of {directory.name!r} stay as they are: their checkpoint has them in "
            f"4 bits ({now.quant_type}), and no 16-bit form to quantize again"
        )
    return replace(
        now,
        layout=layout or now.layout,
        attention=_rounded(directory, "attention", now.attention, bits.attention),
        head=_rounded(directory, "head", now.head, bits.head),
        scales="calibrated" if calibrated else now.scales,
    )


def _rounded(directory: Path, part: str, stored: QuantType, bits: int | None) -> QuantType:
    has = TYPES[stored].bits
    if bits is None or bits == has:
        return stored
    if has == 16 and bits in _BITS:
        return type_of_bits(bits)
    raise UsageError(
        f"the {part} of {directory.name!r} has {has} bits: only 16 can be converted, and only to "
        "8, 6 or 5",
        hint="Download the model again, under another name (--name) or after 'mixchat rm'.",
    )


def convert(
    directory: Path,
    target: Quantization,
    progress: Progress,
    calibrator: Calibrator | None = None,
) -> bool:
    """Convert an installed model to the `target` of `find_target`. Return False if it is so.

    `calibrator` makes anew what it has inputs of. Raises `CheckpointError` for damaged files,
    `ResourceError` if the disk has no room for one file more. The next call resumes after a
    failure.
    """
    finish_replacement(directory)
    manifest = read_manifest(directory)
    check_files(directory, manifest)
    return _Converter(directory, manifest, target, progress, calibrator).run()


class _Converter:
    def __init__(
        self,
        directory: Path,
        manifest: Manifest,
        target: Quantization,
        progress: Progress,
        calibrator: Calibrator | None,
    ) -> None:
        self._directory, self._manifest, self._progress = directory, manifest, progress
        self._target, self._calibrator = target, calibrator
        self._remade = _remade_files(calibrator.inputs) if calibrator else set()
        self._old = installed_blueprint(directory, manifest)
        if calibrator is not None:
            self._target = replace(target, quant_type=calibrator.quant_type(target.quant_type))
        forms = calibrator.forms if calibrator else {}
        self._new = _converted(self._old, self._target, self._remade, forms)
        self._headers = self._new.headers()
        self._files = _files_that_change(self._old, self._new, self._remade)

    def run(self) -> bool:
        if not self._files:
            return self._rename_quantization()
        self._check_disk()
        sizes = {name: sum(old.nbytes for old, _ in pairs) for name, pairs in self._files.items()}
        title = f"converting {self._directory.name}"
        with progress_bar(self._progress, title, sum(sizes.values())) as task:
            for name in [*self._files]:
                self._replace(name, task)
        return True

    def _rename_quantization(self) -> bool:
        """Write the target to the manifest if no file changes."""
        after = self._after()
        if after != self._manifest:
            write_manifest(self._directory, after)
        return after != self._manifest

    def _check_disk(self) -> None:
        needed = max(self._headers[name].size for name in self._files) + _MANIFESTS_BYTES
        free = machine.free_disk(self._directory)
        disk = f"{format_least(needed)} of disk in {self._directory}, {format_size(free)} free"
        if needed > free:
            raise ResourceError(
                f"not enough disk: a conversion takes {disk}",
                hint="Free some space: a conversion needs room for a second copy of one file.",
            )
        if self._calibrator is None:  # a calibration has said what it takes
            self._progress.note(f"the conversion takes {disk}")

    def _replace(self, name: str, task: Task) -> None:
        written = self._directory / f"{name}{NEW_SUFFIX}"
        digests = self._rewrite(name, written, task)
        expert = self._files.pop(name)[-1][1].expert
        self._manifest = self._after({name: WeightsRecord(self._headers[name].size, digests)})
        replace_file(self._directory, self._manifest, name, written)
        if self._calibrator is not None and name in self._remade:
            inputs = self._calibrator.inputs
            inputs.remove_dense() if expert is None else inputs.remove(expert[0])

    def _after(self, made: Mapping[str, WeightsRecord] = MappingProxyType({})) -> Manifest:
        now, weights = self._manifest, {}
        target, own = self._target.description(), self._new.quantizations()
        for name, record in {**now.weights, **made}.items():
            done = name not in self._files
            values = own[name].description() if done else now.quantization_of(name)
            weights[name] = replace(record, unlike=unlike(values, target))
        checkpoint = now.checkpoint | (self._calibrator.reader.digests if self._calibrator else {})
        return replace(now, quantization=target, weights=weights, checkpoint=checkpoint)

    def _rewrite(self, name: str, path: Path, task: Task) -> dict[str, str]:
        """Write a converted file, and return its tensors' SHA-256s in hex."""
        digests: dict[str, str] = {}
        with (
            SafetensorsFile(self._directory / name) as file,
            SafetensorsWriter(path, self._headers[name].specs) as writer,
        ):
            if file.header.specs != self._old.files()[name]:
                raise CheckpointError(
                    f"{file.path}: its tensors are not those of this model",
                    hint=repair_hint(self._directory),
                )
            for old, new in self._files[name]:
                remade = name in self._remade and _can_be_remade(new)
                made = (
                    self._calibrator.make(new)
                    if self._calibrator and remade
                    else self._made(file, old, new)
                )
                for spec, tensor in zip(new.tensors, made, strict=True):
                    writer.write(spec.name, tensor)
                    digests[spec.name] = tensor_sha256(tensor)
                task.advance(old.nbytes)
        return digests

    def _made(self, file: SafetensorsFile, old: ModelPart, new: ModelPart) -> list[torch.Tensor]:
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
            return new.linear.encode(tensors[0], bias=tensors[-1] if new.linear.bias else None)
        old.linear.convert(tensors[: len(old.linear.tensors)], new.linear)
        return tensors


def _remade_files(inputs: ExpertInputs) -> set[str]:
    """Return the files of which a calibration has inputs."""
    experts = {experts_file(layer) for layer in inputs.layers}
    return experts | {SHARED_FILE} if inputs.has_dense else experts


def _can_be_remade(part: ModelPart) -> bool:
    """Return whether a calibration makes a part of a remade file anew."""
    return part.expert is not None or (part.linear is not None and is_calibrated(part.linear))


def _converted(
    old: Blueprint, target: Quantization, remade: set[str], forms: Mapping[str, Form]
) -> Blueprint:
    """Return the converted model. Only the files that are made anew get other scales and types.

    forms: the types of the experts in these files.
    """
    layers = []
    for name, stored in old.quantizations().items():
        if name != SHARED_FILE:
            own: Form = stored.quant_type, stored.down
            up, down = forms.get(name, own) if name in remade else own
            scales = "calibrated" if name in remade else stored.scales
            layers.append(replace(target, quant_type=up, down=down, scales=scales))
    shared = replace(target, scales=_shared_scales(old, target, remade))
    return Blueprint(old.config, shared, tuple(layers))


def _shared_scales(old: Blueprint, target: Quantization, remade: set[str]) -> Scales:
    """Return the scales of attention and head after the conversion."""
    before, after = (
        any(map(is_calibrated, form.shared_matrices.values()))
        for form in (old, Blueprint(old.config, target))
    )
    if target.scales != "calibrated" or SHARED_FILE in remade or not after:
        return target.scales
    return old.quantization.scales if before else "search"


def _files_that_change(
    old: Blueprint, new: Blueprint, remade: set[str]
) -> dict[str, list[tuple[ModelPart, ModelPart]]]:
    """Return the parts, before and after, of each file that changes.

    remade: the files that are made anew.
    """
    files: dict[str, list[tuple[ModelPart, ModelPart]]] = {}
    changed = set()
    for before, after in _pairs(old, new):
        files.setdefault(after.file, []).append((before, after))
        same = before.tensors == after.tensors and _packed(before) == _packed(after)
        if not same or after.file in remade:
            changed.add(after.file)
    return {name: pairs for name, pairs in files.items() if name in changed}


def _pairs(old: Blueprint, new: Blueprint) -> Iterator[tuple[ModelPart, ModelPart]]:
    """Yield each part of the old model with the part that is made of it.

    A new head is made of the embedding.
    """
    before = {(part.name, part.linear is None): part for part in model_parts(old)}
    for after in model_parts(new):
        same = before.get((after.name, after.linear is None))
        yield same or before[EMBEDDING, True], after


def _packed(part: ModelPart) -> bool:
    return part.linear is not None and part.linear.packed
