"""The layout that each file of a model has while a conversion (`convert.py`) is unfinished.

The directory `conversion/` exists for as long as the conversion is unfinished. A file of weights
has the new layout if the journal in `conversion/` names it and `conversion/` no longer holds it.
All other files have the layout that the manifest names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mixchat.errors import CheckpointError
from mixchat.weights.format.blueprint import Blueprint
from mixchat.weights.format.journal import read_head, read_journal
from mixchat.weights.format.manifest import CONVERSION_DIR, FORMAT, Manifest
from mixchat.weights.make.parts import Part, parts
from mixchat.weights.matrix.linear import Layout

_LAYOUTS: tuple[Layout, ...] = ("bitsandbytes", "cpu-packed")


@dataclass(frozen=True)
class HalfConverted:
    """The new layout of an unfinished conversion, and the SHA-256s of the files that have it.

    `digests` maps the name of such a file to its tensors' SHA-256s by name.
    """

    layout: Layout
    digests: dict[str, dict[str, str]]


def read_half_converted(directory: Path) -> HalfConverted | None:
    """Return the unfinished conversion of a model; None where there is none.

    Raises `CheckpointError` where its journal cannot be read.
    """
    work = directory / CONVERSION_DIR
    if not work.exists():
        return None
    head = read_head(work) or {}
    for layout in _LAYOUTS:
        if head == conversion_head(layout):
            made, _ = read_journal(work, head)
            moved = {name: made[name] for name in made if not (work / name).exists()}
            return HalfConverted(layout, moved)
    raise CheckpointError(
        f"{work}: the record of a conversion is damaged",
        hint="Remove the model (mixchat rm) and download it again.",
    )


def manifest_of_files(directory: Path, manifest: Manifest) -> Manifest:
    """Return the manifest, with the SHA-256s of the files that have been converted already."""
    unfinished = read_half_converted(directory)
    return with_digests(manifest, unfinished.digests) if unfinished else manifest


def parts_of_files(directory: Path, blueprint: Blueprint) -> Iterator[Part]:
    """Yield the parts of a model, each in the layout that its file has now."""
    unfinished = read_half_converted(directory)
    if unfinished is None:
        yield from parts(blueprint)
        return
    for old, new in both_layouts(blueprint, unfinished.layout):
        yield new if new.file in unfinished.digests else old


def conversion_head(layout: Layout) -> dict[str, Any]:
    """Return the first line of a conversion's journal."""
    return {"format": FORMAT, "layout": layout}


def both_layouts(blueprint: Blueprint, layout: Layout) -> Iterator[tuple[Part, Part]]:
    """Yield each part of a model as it is, and as it is in the other layout."""
    return zip(parts(blueprint), parts(blueprint.in_layout(layout)), strict=True)


def with_digests(manifest: Manifest, digests: dict[str, dict[str, str]]) -> Manifest:
    """Return the manifest with these SHA-256s for the tensors of these files."""
    weights = {
        name: replace(record, sha256=digests.get(name, record.sha256))
        for name, record in manifest.weights.items()
    }
    return replace(manifest, weights=weights)
