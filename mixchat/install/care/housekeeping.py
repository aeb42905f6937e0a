"""Removes models, and the leftovers of killed processes. What mixchat did not write stays."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mixchat.base.errors import ModelNotFoundError, UsageError
from mixchat.base.files import TEMPORARY_SUFFIX
from mixchat.base.lock import LOCK_SUFFIX, Busy, exclusive_lock
from mixchat.base.machine import disk_usage
from mixchat.base.settings import models_dir
from mixchat.weights.format.manifest import is_installed
from mixchat.weights.format.own_files import entries_of, foreign_files, own_files, remove_path
from mixchat.weights.format.workspace import (
    clear,
    is_model_directory,
    is_resumable,
    key_of,
    put_aside,
    settle,
    workspace,
)


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
        put_aside(target)
        return foreign_files(target)


@contextmanager
def not_in_use(target: Path) -> Iterator[None]:
    """Hold a model's lock, and settle its workspace. Raises `UsageError` if it is in use."""
    try:
        with exclusive_lock(target):
            settle(target)
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
    visible = [path for path in entries_of(models_dir()) if not path.name.startswith(".")]
    foreign = [path for path in visible if not is_model_directory(path)]
    for target in _targets():
        with suppress(Busy), exclusive_lock(target):
            if not target.is_symlink():
                yield from _swept(target, unfinished)
    for path in foreign:
        yield Leftover(path, 0, "foreign")


def _swept(target: Path, unfinished: bool) -> Iterator[Leftover]:
    """Yield the leftovers of a model, and what in its directory is not mixchat's."""
    work_dir = workspace(target)
    if os.path.lexists(work_dir):
        size = disk_usage(work_dir)
        settle(target)
        resumable = is_resumable(target) and not unfinished
        if not resumable:
            clear(target)
        yield Leftover(work_dir, size, "resumable" if resumable else "removed")
    if not is_installed(target):
        return
    for path in own_files(target):
        if path.name.endswith(TEMPORARY_SUFFIX):
            size = disk_usage(path)
            remove_path(path)
            yield Leftover(path, size, "removed")
    for path in foreign_files(target):
        yield Leftover(path, 0, "foreign")


def _targets() -> list[Path]:
    """Return the directories of models, also those with only a workspace or a lock left."""
    names = set()
    for path in entries_of(models_dir()):
        name = key_of(path.name).removesuffix(LOCK_SUFFIX)
        if name != path.name:
            names.add(name.removeprefix("."))
        elif is_installed(path):
            names.add(name)
    return [models_dir() / name for name in sorted(names)]
