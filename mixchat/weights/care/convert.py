"""Rounds attention and head of an installed model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mixchat.base.errors import UsageError
from mixchat.base.options import DenseBits
from mixchat.base.progress import Progress
from mixchat.weights.format.blueprint import SHARED_FILE, Blueprint, Quantization, layers_unlike
from mixchat.weights.format.installed_model import installed_blueprint
from mixchat.weights.format.manifest import check_files, read_manifest
from mixchat.weights.make.calibrator import is_calibrated
from mixchat.weights.make.rebuild import Rebuild
from mixchat.weights.matrix.linear import TYPES, type_of_bits
from mixchat.weights.matrix.quant_type import QuantType

_BITS = (8, 6, 5)  # to which 16 can be rounded


def find_target(directory: Path, bits: DenseBits) -> Quantization:
    """Return the quantization to convert to.

    Raises `UsageError` if a conversion cannot make it.
    """
    now = Quantization.from_description(read_manifest(directory).quantization)
    if now.quant_type == "none":
        raise UsageError(
            f"{directory.name!r} has no experts in 3 or 4 bits: there is nothing to convert"
        )
    return replace(
        now,
        attention=_rounded(directory, "attention", now.attention, bits.attention),
        head=_rounded(directory, "head", now.head, bits.head),
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


def convert(directory: Path, target: Quantization, progress: Progress) -> bool:
    """Convert an installed model to the `target` of `find_target`. Return False if it is so.

    Raises `CheckpointError` for damaged files, `ResourceError` if the disk has no room for the new
    ones. The next call resumes after a failure.
    """
    manifest = read_manifest(directory)
    check_files(directory, manifest)
    old = installed_blueprint(directory, manifest)
    build = Rebuild(directory, _converted(old, target), "converting")
    if not build.changed:
        return False
    progress.note(f"converting takes {build.need}")
    build.run(progress)
    return True


def _converted(old: Blueprint, target: Quantization) -> Blueprint:
    """Return the model with the target's attention and head."""
    shared = replace(target, scales=old.quantization.scales)
    was_calibrated, gets_calibrated = (
        any(map(is_calibrated, model.shared_matrices.values()))
        for model in (old, Blueprint(old.config, shared))
    )
    if shared.scales == "calibrated" and gets_calibrated and not was_calibrated:
        shared = replace(shared, scales="search")  # rounded just now, without inputs
    layers = [
        replace(form, attention=target.attention, head=target.head)
        for name, form in old.quantizations().items()
        if name != SHARED_FILE
    ]
    return Blueprint(old.config, shared, layers_unlike(shared, layers))
