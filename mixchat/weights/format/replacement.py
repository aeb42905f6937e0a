"""Replaces a file of weights so that the model can be used at every moment, also after a power cut.

The new file gets a name of its own, which follows from the SHA-256s of its tensors. Then the
manifest is written: from that moment on the model has the new file. Then the new file gets the name
of the old one. A reader (`manifest.path_of`) takes the first of these that is there:

    experts-003.safetensors.5ee86d3270a1f2c4.new    only if the manifest has these SHA-256s
    experts-003.safetensors

A new file whose SHA-256s the manifest does not have is what a killed process left.
"""

from __future__ import annotations

from pathlib import Path

from mixchat.base.files import rename_durably
from mixchat.weights.format.manifest import (
    NEW_SUFFIX,
    Manifest,
    new_path,
    path_of,
    read_manifest,
    restore_manifests,
    write_manifest,
)


def replace_file(directory: Path, manifest: Manifest, name: str, written: Path) -> None:
    """Replace a file of weights by `written`; `manifest` has the new record."""
    new = new_path(directory, manifest, name)
    rename_durably(written, new)
    write_manifest(directory, manifest)
    rename_durably(new, directory / name)


def finish_replacement(directory: Path) -> None:
    """Finish a replacement that was cut off, and remove what others have left. Raises as below."""
    place_new_files(directory)
    for left in directory.glob(f"*{NEW_SUFFIX}"):
        left.unlink()


def place_new_files(directory: Path) -> None:
    """Give the model's new files their last names, and make both manifests equal.

    The caller has the model's lock. Raises `CheckpointError` where both manifests are damaged: then
    nothing tells which new files are the model's.
    """
    restore_manifests(directory)
    manifest = read_manifest(directory)
    for name in manifest.weights:
        path = path_of(directory, manifest, name)
        if path != directory / name:
            rename_durably(path, directory / name)
