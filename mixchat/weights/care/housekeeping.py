"""Removes models, and the leftovers of killed processes."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from mixchat.base import machine
from mixchat.base.errors import CheckpointError, ModelNotFoundError, UsageError
from mixchat.base.lock import Busy, exclusive_lock
from mixchat.base.settings import models_dir
from mixchat.weights.format.journal import JOURNAL_FILE, Journal
from mixchat.weights.format.manifest import INPUTS_DIR, MANIFEST_COPY, MANIFEST_FILE, is_installed
from mixchat.weights.format.model_files import NEW_SUFFIX, place_new_files
from mixchat.weights.make.unfinished import SPILL_PREFIX
from mixchat.weights.source import hub
from mixchat.weights.source.demo import BUILD_DIR
from mixchat.weights.source.hub_checkpoint import SOURCE_DIR
from mixchat.weights.source.transfer import PART_SUFFIX


@dataclass(frozen=True)
class Leftover:
    """A file or directory that no finished model needs, and its bytes.

    `resumable`: a download or a calibration can resume it.
    """

    path: Path
    bytes: int
    resumable: bool
    removed: bool = False


def remove(target: Path) -> None:
    """Remove a model, finished or not. Raises `UsageError` if another process uses it."""
    if not target.is_symlink() and not target.is_dir():
        raise ModelNotFoundError(f"the model {target.name!r} is not on this machine")
    with not_in_use(target):
        if target.is_symlink():
            target.unlink()
            return
        # Without manifests nothing takes the rest for a model.
        for name in (MANIFEST_COPY, MANIFEST_FILE):
            (target / name).unlink(missing_ok=True)
        shutil.rmtree(target)


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

    Resumable work is removed only with `unfinished`. Models in use stay as they are.
    """
    for target in _targets():
        with suppress(Busy), exclusive_lock(target):
            for leftover in _left_in(target):
                yield _cleared(leftover, unfinished)
    # Other tools use the files that --keep-source puts into huggingface_hub's cache.
    for path in sorted(hub.cache_dir().glob(f"models--*/blobs/*{PART_SUFFIX}")):
        blob = path.name.removesuffix(PART_SUFFIX)
        with suppress(Busy), hub.blob_lock(path.parents[1].name, blob, timeout=1):
            yield _cleared(Leftover(path, machine.disk_usage(path), resumable=True), unfinished)


def _cleared(leftover: Leftover, unfinished: bool) -> Leftover:
    if leftover.resumable and not unfinished:
        return leftover
    if leftover.path.is_dir() and not leftover.path.is_symlink():
        shutil.rmtree(leftover.path)
    else:
        leftover.path.unlink(missing_ok=True)
    return replace(leftover, removed=True)


def _targets() -> list[Path]:
    """Return the directories of models, also those with only a lock left."""
    try:
        entries = sorted(models_dir().iterdir())
    except OSError:
        return []
    names = {entry.name for entry in entries if entry.is_dir() and entry.name[0] != "."}
    names |= {entry.name[1:-5] for entry in entries if re.fullmatch(r"\..+\.lock", entry.name)}
    return [models_dir() / name for name in sorted(names)]


def _left_in(target: Path) -> Iterator[Leftover]:
    if not target.is_dir() or target.is_symlink():
        return
    if not is_installed(target):
        yield Leftover(target, machine.disk_usage(target), Journal(target).head is not None)
        return
    names = [JOURNAL_FILE, SOURCE_DIR, BUILD_DIR, f"{SPILL_PREFIX}*", "*.tmp", f"*{PART_SUFFIX}"]
    with suppress(CheckpointError):  # without a manifest, nothing tells which new files are used
        place_new_files(target)
        names.append(f"*{NEW_SUFFIX}")
    for path in sorted(path for name in [INPUTS_DIR, *names] for path in target.glob(name)):
        yield Leftover(path, machine.disk_usage(path), resumable=path.name == INPUTS_DIR)
