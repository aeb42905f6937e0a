"""The names by which mixchat knows its own files in a model's directory. All other files stay.

The data directory belongs to a person, who may keep a checkpoint in models/, or notes next to a
model. So mixchat removes and overwrites only what it wrote. Names with `mixchat.` are its own.
Others, such as config.json, are its own only if a manifest or a journal shows it:

    models/tiny/mixchat.json                 marked
    models/tiny/config.json                  in the manifest
    models/tiny/thesis.txt                   foreign
    models/half/mixchat.journal.jsonl        marked
    models/half/experts-000.safetensors      a model's file, next to a journal
    models/mine/config.json                  foreign, as all of this directory
"""

from __future__ import annotations

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from mixchat.base.errors import CheckpointError
from mixchat.base.files import TEMPORARY_SUFFIX
from mixchat.base.machine import disk_usage
from mixchat.weights.format.manifest import MANIFESTS, is_installed, read_either_manifest

JOURNAL_FILE = "mixchat.journal.jsonl"
SOURCE_DIR = "mixchat.source"  # of fetched shards and small files
BUILD_DIR = "mixchat.build"  # of the demo's checkpoint
INPUTS_DIR = "mixchat.inputs"  # of a calibration
SPILL_PREFIX = "mixchat.spill-"  # of files of tensors that a later part needs
PART_SUFFIX = ".mixchat.part"  # of a file that is being fetched
NEW_SUFFIX = ".mixchat.new"  # of a file that replaces another one

# The small files of a checkpoint, which its model takes over.
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
_NAMES = (*MANIFESTS, JOURNAL_FILE, SOURCE_DIR, BUILD_DIR, INPUTS_DIR)
_SUFFIXES = (TEMPORARY_SUFFIX, PART_SUFFIX, NEW_SUFFIX)


def is_marked(name: str) -> bool:
    """Return whether only mixchat gives a file or directory such a name."""
    return name in _NAMES or name.startswith(SPILL_PREFIX) or name.endswith(_SUFFIXES)


def is_model_directory(directory: Path) -> bool:
    """Return whether mixchat has written to a directory."""
    return any(is_marked(path.name) for path in _entries(directory))


def own_files(directory: Path) -> list[Path]:
    """Return the files and directories in a model's directory that are mixchat's."""
    entries = _entries(directory)
    model_files = _model_files(directory, entries)
    return [path for path in entries if is_marked(path.name) or path in model_files]


def foreign_files(directory: Path) -> list[Path]:
    """Return the files and directories in a model's directory that mixchat did not write."""
    own = own_files(directory)
    return [path for path in _entries(directory) if path not in own]


def files_in_the_way(directory: Path) -> list[Path]:
    """Return the foreign files that have the names of a model's files."""
    return [path for path in foreign_files(directory) if _is_model_file(path.name)]


def own_bytes(directory: Path) -> int:
    """Return the bytes that mixchat's files in a model's directory use on disk."""
    return sum(map(disk_usage, own_files(directory)))


def remove_own_files(directory: Path) -> list[Path]:
    """Remove mixchat's files, and the directory if it is empty then. Return the files that stay.

    It may be cut off. The manifests go first, so that nothing takes the other files for a model.
    Until the last one is gone, a journal shows that they are mixchat's.
    """
    own, journal = own_files(directory), directory / JOURNAL_FILE
    if is_installed(directory) and not os.path.lexists(journal):
        with suppress(OSError):  # the disk is full
            journal.touch()
            own.append(journal)
    for path in sorted(own, key=lambda path: (path.name not in MANIFESTS, path == journal)):
        remove_path(path)
    foreign = _entries(directory)
    if not foreign:
        directory.rmdir()
    return foreign


def remove_path(path: Path) -> None:
    """Remove a file, a link or a directory of mixchat's."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _entries(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError:
        return []


def _model_files(directory: Path, entries: list[Path]) -> set[Path]:
    """Return the files without a mark that a manifest lists, or that stand next to a journal."""
    marks = {path.name for path in entries}.intersection((*MANIFESTS, JOURNAL_FILE))
    names: set[str] = set()
    with suppress(CheckpointError):
        names.update(read_either_manifest(directory).sizes)
    if marks and (not names or JOURNAL_FILE in marks):
        names.update(path.name for path in entries if _is_model_file(path.name))
    return {path for path in entries if path.name in names and not _is_real_directory(path)}


def _is_model_file(name: str) -> bool:
    return name in COMPANION_FILES or _WEIGHTS.fullmatch(name) is not None


def _is_real_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()
