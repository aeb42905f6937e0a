"""The form that each file of a model has while a conversion (`convert.py`) is unfinished.

The directory `conversion/` exists for as long as the conversion is unfinished. A file of weights
has the new form if the journal in `conversion/` names it and `conversion/` no longer holds it. All
other files have the form that the manifest names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mixchat.errors import CheckpointError
from mixchat.weights.format.blueprint import SHARED_FILE, Blueprint, Quantization
from mixchat.weights.format.journal import read_head, read_journal
from mixchat.weights.format.manifest import (
    CONVERSION_DIR,
    FORMAT,
    Manifest,
    check_quantization,
)
from mixchat.weights.make.parts import Part, parts

_CHANGED = ("layout", "attention", "head", "scales")  # of the quantization, by a conversion


@dataclass(frozen=True)
class HalfConverted:
    """An unfinished conversion: the new form, and the files that have it.

    `head` is the first line of its journal; `digests` maps the name of such a file to its tensors'
    SHA-256s by name.
    """

    head: dict[str, Any]
    target: Quantization
    digests: dict[str, dict[str, str]]

    @property
    def sizes(self) -> dict[str, int]:
        """Return the new sizes of files in bytes, where they may differ from the old ones."""
        return new_sizes(self.head)


def read_half_converted(directory: Path, manifest: Manifest) -> HalfConverted | None:
    """Return the unfinished conversion of a model; None where there is none.

    Raises `CheckpointError` where its journal cannot be read.
    """
    work = directory / CONVERSION_DIR
    if not work.exists():
        return None
    head = read_head(work) or {}
    target = _target(head, work, manifest)
    made, _ = read_journal(work, head)
    moved = {name: made[name] for name in made if not (work / name).exists()}
    return HalfConverted(head, target, moved)


def _target(head: dict[str, Any], work: Path, manifest: Manifest) -> Quantization:
    # A conversion that an earlier version has begun changes the layout alone.
    expected = {2: {"format", "layout"}, FORMAT: {"format", "size", *_CHANGED}}
    changes = {key: head[key] for key in _CHANGED if key in head}
    try:
        if head.keys() != expected.get(head.get("format", 0)) or not _is_size(head.get("size", 0)):
            raise CheckpointError("another head")
        description = manifest.quantization | changes
        check_quantization(work, description)
    except (CheckpointError, TypeError):
        raise CheckpointError(
            f"{work}: the record of a conversion is damaged",
            hint="Remove the model (mixchat rm) and download it again.",
        ) from None
    return Quantization.from_description(description)


def _is_size(value: object) -> bool:
    return type(value) is int and value >= 0


def manifest_of_files(directory: Path, manifest: Manifest) -> Manifest:
    """Return the manifest that describes the files as they are now.

    Its layout alone is that of files which are not converted yet.
    """
    unfinished = read_half_converted(directory, manifest)
    if unfinished is None:
        return manifest
    found = with_digests(manifest, unfinished.digests, unfinished.sizes)
    if SHARED_FILE not in unfinished.digests:
        return found
    layout = manifest.quantization["layout"]
    how = replace(unfinished.target, layout=layout)
    return replace(found, quantization=how.description())


def parts_of_files(directory: Path, manifest: Manifest, blueprint: Blueprint) -> Iterator[Part]:
    """Yield the parts of a model, each in the form that its file has now.

    blueprint: that of `manifest`, which comes from `manifest_of_files`.
    """
    unfinished = read_half_converted(directory, manifest)
    converted = unfinished.digests if unfinished else {}
    yield from (part for part in parts(blueprint) if part.file not in converted)
    if unfinished:
        target = replace(blueprint, quantization=unfinished.target)
        yield from (part for part in parts(target) if part.file in converted)


def conversion_head(target: Quantization, size: int) -> dict[str, Any]:
    """Return the first line of a conversion's journal; size: that of the new shared file."""
    changed = {key: getattr(target, key) for key in _CHANGED}
    return {"format": FORMAT, "size": size} | changed


def new_sizes(head: Mapping[str, Any]) -> dict[str, int]:
    """Return the sizes in bytes that a conversion's journal names, by file."""
    return {SHARED_FILE: head["size"]} if "size" in head else {}


def with_digests(
    manifest: Manifest, digests: Mapping[str, dict[str, str]], sizes: Mapping[str, int]
) -> Manifest:
    """Return the manifest with these SHA-256s for the tensors of these files, and their sizes."""
    weights = {
        name: replace(record, size=sizes.get(name, record.size), sha256=digests[name])
        if name in digests
        else record
        for name, record in manifest.weights.items()
    }
    return replace(manifest, weights=weights)
