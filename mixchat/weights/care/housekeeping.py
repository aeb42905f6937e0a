"""Removes models, and the leftovers of killed processes. What mixchat did not write stays."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mixchat.base.errors import CheckpointError, ModelNotFoundError, UsageError
from mixchat.base.lock import LOCK_SUFFIX, Busy, exclusive_lock
from mixchat.base.machine import disk_usage
from mixchat.base.settings import models_dir
from mixchat.weights.format.journal import Journal
from mixchat.weights.format.manifest import MANIFESTS, is_installed
from mixchat.weights.format.model_files import place_new_files
from mixchat.weights.format.own_files import (
    INPUTS_DIR,
    NEW_SUFFIX,
    PART_SUFFIX,
    foreign_files,
    is_marked,
    is_model_directory,
    own_bytes,
    own_files,
    remove_own_files,
    remove_path,
)
from mixchat.weights.source import hub


@dataclass(frozen=True)
class Leftover:
    """A file or directory that no finished model needs, and its bytes.

    "resumable": a download or a calibration can resume it, so it stays. "foreign": mixchat did not
    write it, so it stays, and its bytes are not counted.
    """

    path: Path
    bytes: int
    state: Literal["removed", "resumable", "foreign"]


def remove(target: Path) -> list[Path]:
    """Remove a model, finished or not. Return the files in its directory that are not mixchat's.

    Raises `UsageError` if another process uses it.
    """
    if target.is_symlink():
        with not_in_use(target):
            target.unlink()
        return []
    if not is_model_directory(target):
        raise ModelNotFoundError(f"the model {target.name!r} is not on this machine")
    with not_in_use(target):
        return remove_own_files(target)


@contextmanager
def not_in_use(target: Path) -> Iterator[None]:
    """Hold a model's lock. Raises `UsageError` if another process has it."""
    try:
        with exclusive_lock(target):
            yield
    except Busy:
        raise UsageError(
            f"another mixchat is working on the model {target.name!r}",
            hint="Wait until it has finished, or stop it.",
        ) from None


def sweep(*, unfinished: bool = False) -> Iterator[Leftover]:
    """Remove the leftovers of killed processes, and yield each as it is found.

    Resumable work is removed only with `unfinished`. Models in use stay as they are, and so does
    all that mixchat did not write.
    """
    visible = [path for path in _entries(models_dir()) if not path.name.startswith(".")]
    foreign = [path for path in visible if not is_model_directory(path)]
    for target in _targets():
        with suppress(Busy), exclusive_lock(target):
            if is_model_directory(target) and not target.is_symlink():
                yield from _swept(target, unfinished)
    for path in foreign:
        yield Leftover(path, 0, "foreign")
    # Other tools use the files that --keep-source puts into huggingface_hub's cache.
    for path in sorted(hub.cache_dir().glob(f"models--*/blobs/*{PART_SUFFIX}")):
        blob = path.name.removesuffix(PART_SUFFIX)
        with suppress(Busy), hub.blob_lock(path.parents[1].name, blob, timeout=1):
            yield _cleared(path, resumable=not unfinished)


def _swept(target: Path, unfinished: bool) -> Iterator[Leftover]:
    """Yield the leftovers in a model's directory, and what in it is not mixchat's."""
    foreign = foreign_files(target)
    if is_installed(target):
        for path in _left_in(target):
            yield _cleared(path, resumable=path.name == INPUTS_DIR and not unfinished)
    else:
        size = own_bytes(target)
        resumable = Journal(target).head is not None and not unfinished
        if not resumable:
            remove_own_files(target)
        yield Leftover(target, size, "resumable" if resumable else "removed")
    for path in foreign:
        yield Leftover(path, 0, "foreign")


def _left_in(target: Path) -> list[Path]:
    """Return what mixchat left in the directory of an installed model."""
    used_suffix: tuple[str, ...] = ()
    try:
        place_new_files(target)
    except CheckpointError:  # without a manifest, nothing tells which new files are used
        used_suffix = (NEW_SUFFIX,)
    marked = [path for path in own_files(target) if is_marked(path.name)]
    return [
        path
        for path in marked
        if path.name not in MANIFESTS and not path.name.endswith(used_suffix)
    ]


def _cleared(path: Path, *, resumable: bool) -> Leftover:
    size = disk_usage(path)
    if not resumable:
        remove_path(path)
    return Leftover(path, size, "resumable" if resumable else "removed")


def _targets() -> list[Path]:
    """Return the directories of models, also those with only a lock left."""
    locked = re.compile(rf"\.(.+){re.escape(LOCK_SUFFIX)}")
    names = set()
    for path in _entries(models_dir()):
        if match := locked.fullmatch(path.name):
            names.add(match[1])
        elif not path.name.startswith(".") and is_model_directory(path):
            names.add(path.name)
    return [models_dir() / name for name in sorted(names)]


def _entries(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError:
        return []
