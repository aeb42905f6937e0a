"""The files of an installed model, and the replacement of one while the model stays usable.

The replacement survives a power cut. The new file gets a name that follows from the SHA-256s of its
tensors. Then the manifest is written, and the model has the new file. Then the file gets its final
name. `path_of` takes the first of these that is there:

    experts-003.safetensors.5ee86d3270a1f2c4.mixchat.new    only if the manifest has these SHA-256s
    experts-003.safetensors
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from mixchat.base.errors import CheckpointError
from mixchat.base.files import rename_durably
from mixchat.weights.format.manifest import (
    Manifest,
    read_manifest,
    repair_hint,
    restore_manifests,
    write_manifest,
)
from mixchat.weights.format.own_files import NEW_SUFFIX


def path_of(directory: Path, manifest: Manifest, name: str) -> Path:
    """Return the path of a model's file, which may still have a new file's name."""
    if name in manifest.weights:
        new = new_path(directory, manifest, name)
        if new.is_file():
            return new
    return directory / name


def check_files(directory: Path, manifest: Manifest) -> None:
    """Compare each file's size with the manifest. Raises `CheckpointError`."""
    for name, expected in manifest.sizes.items():
        path = path_of(directory, manifest, name)
        if not path.is_file():
            raise CheckpointError(f"{path}: the file is missing", hint=repair_hint(directory))
        if (size := path.stat().st_size) != expected:
            raise CheckpointError(
                f"{path}: {size} bytes, but the manifest says {expected}",
                hint=repair_hint(directory),
            )


def replace_file(directory: Path, manifest: Manifest, name: str, written: Path) -> None:
    """Replace a file of weights by `written`, of which `manifest` has the record."""
    new = new_path(directory, manifest, name)
    rename_durably(written, new)
    write_manifest(directory, manifest)
    rename_durably(new, directory / name)


def finish_replacement(directory: Path) -> None:
    """Finish a replacement that was cut off, and remove other new files.

    The caller has the model's lock. Raises as `place_new_files` does.
    """
    place_new_files(directory)
    for path in directory.glob(f"*{NEW_SUFFIX}"):
        path.unlink()


def place_new_files(directory: Path) -> None:
    """Give the model's new files their final names, and make both manifests equal.

    The caller has the model's lock. Raises `CheckpointError` if both manifests are damaged.
    """
    restore_manifests(directory)
    manifest = read_manifest(directory)
    for name in manifest.weights:
        path = path_of(directory, manifest, name)
        if path != directory / name:
            rename_durably(path, directory / name)


def new_path(directory: Path, manifest: Manifest, name: str) -> Path:
    """Return the name that a file of weights has before it replaces the old one."""
    tensors = "".join(manifest.weights[name].sha256.values())
    digest = hashlib.sha256(tensors.encode()).hexdigest()
    return directory / f"{name}.{digest[:16]}{NEW_SUFFIX}"
