"""The names by which mixchat knows its own files in a model's directory. All other files stay.

The data directory belongs to a person, who may keep a checkpoint in models/, or notes next to a
model. So mixchat removes and overwrites only what it wrote. Names with `mixchat.` are its own.
Others, such as config.json, are its own only if a manifest lists them:

    models/tiny/mixchat.json        marked
    models/tiny/config.json         in the manifest
    models/tiny/thesis.txt          foreign
    models/mine/config.json         foreign, as all of this directory

What is not finished has a directory of its own (`workspace.py`).
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from mixchat.base.errors import CheckpointError
from mixchat.base.files import TEMPORARY_SUFFIX
from mixchat.base.machine import disk_usage
from mixchat.weights.format.manifest import MANIFESTS, is_installed, read_either_manifest

# The small files of a checkpoint, which an installed model has, too.
COMPANION_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_WEIGHTS = re.compile(r"(shared|experts-[0-9]{3,})\.safetensors")


def own_files(directory: Path) -> list[Path]:
    """Return the files in a model's directory that are mixchat's."""
    entries = entries_of(directory)
    names: set[str] = set()
    if is_installed(directory):
        try:
            names.update(read_either_manifest(directory).sizes)
        except CheckpointError:
            names.update(path.name for path in entries if _is_model_file(path.name))
    return [
        path
        for path in entries
        if path.name in MANIFESTS
        or path.name.endswith(TEMPORARY_SUFFIX)
        or (path.name in names and (path.is_symlink() or not path.is_dir()))
    ]


def foreign_files(directory: Path) -> list[Path]:
    """Return the files and directories in a model's directory that mixchat did not write."""
    own = own_files(directory)
    return [path for path in entries_of(directory) if path not in own]


def files_in_the_way(directory: Path) -> list[Path]:
    """Return the foreign files that have the names of a model's files."""
    return [path for path in foreign_files(directory) if _is_model_file(path.name)]


def own_bytes(directory: Path) -> int:
    """Return the bytes that mixchat's files in a model's directory use on disk."""
    return sum(map(disk_usage, own_files(directory)))


def remove_path(path: Path) -> None:
    """Remove a file, a link or a directory of mixchat's."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def entries_of(directory: Path) -> list[Path]:
    """Return what is in a directory, by name, and nothing if it cannot be read."""
    try:
        return sorted(directory.iterdir())
    except OSError:
        return []


def _is_model_file(name: str) -> bool:
    return name in COMPANION_FILES or _WEIGHTS.fullmatch(name) is not None
