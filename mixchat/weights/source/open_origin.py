"""From what a manifest or a person calls a source to the checkpoint itself, opened."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mixchat.errors import CheckpointError, HubError, ModelNotFoundError
from mixchat.files import read_bytes
from mixchat.progress import Progress
from mixchat.weights import models
from mixchat.weights.format.journal import unfinished_source
from mixchat.weights.format.manifest import Source
from mixchat.weights.source import demo, hub
from mixchat.weights.source.checkpoint_files import INDEX, weight_files
from mixchat.weights.source.hub_origin import HubOrigin
from mixchat.weights.source.origin import LocalOrigin, Origin

BUILD_DIR = "build"


def source_of(ref: models.ModelRef, target: Path, revision: str | None) -> Source:
    """Where the model of `ref` comes from, its commit where it was begun from one.

    Raises `ModelNotFoundError` where nothing says what an unfinished model was made of.
    """
    begun = unfinished_source(target)
    if ref.demo:
        return Source(models.DEMO)
    if ref.path is not None:
        return Source(str(ref.path))
    if ref.repo is not None:
        if begun is not None and (begun.repo, begun.revision) == (ref.repo, revision):
            return begun
        return Source(ref.repo, None, revision)
    if begun is None:
        raise ModelNotFoundError(
            f"nothing says what the unfinished model {ref.key!r} was made of",
            hint=f"Remove it (mixchat rm {ref.key}) and download it again.",
        )
    return begun


@contextmanager
def open_origin(
    source: Source, target: Path, progress: Progress, *, keep_source: bool = False
) -> Iterator[Origin]:
    """The checkpoint of `source`, for a model in `target`; the demo's is built for the while.

    Raises what opening a directory, asking the hub or building the demo model raise.
    """
    if source.repo == models.DEMO:
        with _built_demo(target / BUILD_DIR, progress) as checkpoint:
            yield LocalOrigin(checkpoint, source, fingerprint=demo.WHEEL_SHA256)
    elif Path(source.repo).is_absolute():
        yield LocalOrigin(Path(source.repo), source)
    elif cached := _offline_copy(source):
        commit = Source(source.repo, cached.name, source.revision)
        yield LocalOrigin(cached, commit, fingerprint=cached.name)
    else:
        remote = _look_up(source)
        resolved = Source(source.repo, remote.commit, source.revision)
        yield HubOrigin(remote, resolved, target, keep_source=keep_source)


@contextmanager
def _built_demo(directory: Path, progress: Progress) -> Iterator[Path]:
    shutil.rmtree(directory, ignore_errors=True)
    try:
        demo.build_checkpoint(directory / "checkpoint", progress)
        yield directory / "checkpoint"
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _look_up(source: Source) -> hub.RemoteCheckpoint:
    """What the hub has: the commit that was begun, else what the revision stands for now."""
    if source.commit is not None:
        try:
            return hub.look_up(source.repo, source.commit)
        except ModelNotFoundError:  # the repo's history was rewritten
            pass
    return hub.look_up(source.repo, source.revision)


def _offline_copy(source: Source) -> Path | None:
    """The snapshot in huggingface_hub's cache, where `HF_HUB_OFFLINE` forbids to ask the hub.

    Raises `HubError` where it does, and the snapshot is not there or not whole.
    """
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        return None
    repo = hub.repo_dir(source.repo)
    revision = source.commit or source.revision or constants.DEFAULT_REVISION
    try:
        commit = read_bytes(repo / "refs" / revision).decode().strip()
    except (CheckpointError, ValueError):
        commit = revision
    snapshot = repo / "snapshots" / commit
    if hub.COMMIT.fullmatch(commit) and _is_whole(snapshot):
        return snapshot
    raise HubError(
        f"{source.repo} is not whole in Hugging Face's cache, and HF_HUB_OFFLINE is set",
        hint="Unset it, or name a directory that holds the checkpoint.",
    )


def _is_whole(snapshot: Path) -> bool:
    """Whether the shards are there, too: the small files of a model come without them."""
    try:
        names = [path.name for path in snapshot.iterdir() if path.exists()]
        index = read_bytes(snapshot / INDEX) if INDEX in names else None
        return bool(weight_files(names, index, where=str(snapshot)))
    except (OSError, CheckpointError):
        return False
