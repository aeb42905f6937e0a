"""The workspace of a model, in which a new one is made before it takes the old one's place.

    models/tiny/                              the installed model
    models/.tiny.mixchat.unfinished/
        journal.jsonl                         the tensors that are made
        model/                                the new model, its manifest written last
        spill-...                             tensors that a later part needs
        source/                               fetched shards and small files
        inputs/                               of a calibration
        old/                                  the model before, until it is removed

The swap exchanges model/ and tiny/ in one step, so that a process can be killed at any moment. The
journal has the `base` of the installed model. If that has changed, the new model has taken its
place, and `settle` removes what is left.

All of it is mixchat's, except for files in old/ that mixchat did not write. These return to the
model's directory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from mixchat.base import system
from mixchat.base.errors import CheckpointError
from mixchat.base.files import sync_directory
from mixchat.weights.format.journal import JOURNAL_FILE, Journal
from mixchat.weights.format.manifest import (
    MANIFESTS,
    check_files,
    is_installed,
    read_either_manifest,
    read_manifest,
)
from mixchat.weights.format.own_files import entries_of, foreign_files, own_files, remove_path

SUFFIX = ".mixchat.unfinished"
MODEL_DIR = "model"
OLD_DIR = "old"
SOURCE_DIR = "source"
INPUTS_DIR = "inputs"
SPILL_PREFIX = "spill-"
PART_SUFFIX = ".mixchat.part"  # of a file that is being fetched, also in the hub's cache


def workspace(target: Path) -> Path:
    """Return the workspace of the model in `target`, on the same disk."""
    real = real_path(target)
    return real.parent / f".{real.name}{SUFFIX}"


def real_path(target: Path) -> Path:
    """Return a model's directory, which a link in models/ may name."""
    return target.resolve() if target.is_symlink() else target


def key_of(name: str) -> str:
    """Return the name of the model of a directory in models/, which may be its workspace."""
    match = re.fullmatch(rf"\.(\w.*){re.escape(SUFFIX)}", name)
    return match[1] if match else name


def is_model_directory(target: Path) -> bool:
    """Return whether there is a model, finished or not."""
    return is_installed(target) or workspace(target).is_dir()


def is_resumable(target: Path) -> bool:
    """Return whether a workspace has work that the same command resumes."""
    work_dir = workspace(target)
    return Journal(work_dir).head is not None or (work_dir / INPUTS_DIR).is_dir()


def base_of(target: Path) -> str | None:
    """Return a text that differs for each model installed here in turn, None without a model.

    A repaired model has the manifest that it had, but another inode.
    """
    try:
        return f"{read_either_manifest(target).sha256} {target.stat().st_ino}"
    except CheckpointError:
        return None


def swap_in(target: Path) -> None:
    """Let the finished model in the workspace take the place of `target`, durably."""
    model = workspace(target) / MODEL_DIR
    old = workspace(target) / OLD_DIR
    sync_directory(model)
    if not (is_installed(target) and system.exchange(model, target)):
        if target.exists():
            os.rename(target, old)
        os.rename(model, target)
    sync_directory(target.parent)
    settle(target)


def put_aside(target: Path) -> None:
    """Remove a model, finished or not. Files that mixchat did not write stay."""
    if is_installed(target):
        workspace(target).mkdir(exist_ok=True)
        os.rename(target, workspace(target) / OLD_DIR)
    clear(target)


def settle(target: Path) -> None:
    """With the model's lock, finish a swap that was cut off, and remove a useless workspace."""
    target, work_dir = real_path(target), workspace(target)
    for path in (work_dir, *entries_of(work_dir)):
        if path.is_symlink():  # a link must not choose where files are written
            path.unlink()
    if not target.exists() and _is_whole(work_dir / OLD_DIR):  # cut off between two renames
        os.rename(work_dir / OLD_DIR, target)
    head = Journal(work_dir).head
    if head is not None and head.get("base") != base_of(target):
        clear(target, keep=() if head.get("uses_inputs") else (INPUTS_DIR,))
    _drop_old(target)


def clear(target: Path, keep: Collection[str] = ()) -> None:
    """Empty a workspace, except for `keep`. A finished model in it counts as the old one."""
    work_dir = workspace(target)
    if is_installed(work_dir / MODEL_DIR):
        _drop_old(target)
        os.rename(work_dir / MODEL_DIR, work_dir / OLD_DIR)
    # The journal goes last, because it shows that the workspace is useless.
    for path in sorted(entries_of(work_dir), key=lambda path: path.name == JOURNAL_FILE):
        if path.name not in (OLD_DIR, *keep):
            remove_path(path)
    _drop_old(target)


def _drop_old(target: Path) -> None:
    """Remove the model before, and the workspace if it is empty then.

    What mixchat did not write returns to the model's directory.
    """
    old = workspace(target) / OLD_DIR
    for path in foreign_files(old):
        target.mkdir(exist_ok=True)
        if not os.path.lexists(target / path.name):
            os.rename(path, target / path.name)
    # The manifests go last, because they show which files are mixchat's.
    for path in sorted(own_files(old), key=lambda path: path.name in MANIFESTS):
        remove_path(path)
    for directory in (old, old.parent):
        with suppress(OSError):
            directory.rmdir()


def _is_whole(directory: Path) -> bool:
    try:
        check_files(directory, read_manifest(directory))
    except CheckpointError:
        return False
    return True
