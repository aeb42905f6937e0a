"""Opens the checkpoint that a source names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

from mixchat.base.errors import CheckpointError, HubError, ModelNotFoundError
from mixchat.base.files import read_bytes
from mixchat.base.progress import Progress
from mixchat.install.models import DEMO
from mixchat.install.source import hub
from mixchat.install.source.checkpoint import Checkpoint, DirectoryCheckpoint
from mixchat.install.source.checkpoint_index import INDEX, read_weight_map
from mixchat.install.source.demo import DemoCheckpoint
from mixchat.install.source.gguf_checkpoint import SUFFIX, GgufCheckpoint, choose_files, local_files
from mixchat.install.source.hub_checkpoint import HubCheckpoint
from mixchat.install.source.remote_file import cached_snapshot
from mixchat.weights.format.manifest import Source
from mixchat.weights.format.workspace import SOURCE_DIR, workspace


@contextmanager
def open_checkpoint(
    source: Source,
    target: Path,
    progress: Progress,
    *,
    keep_source: bool = False,
    check: Callable[[Path], None] | None = None,
) -> Iterator[Checkpoint]:
    """Open the checkpoint of `source` for a model in `target`.

    `check` is called with the directory of its small files, and may raise. The demo's files are
    pinned and need no check.
    """
    with closing(_open_checkpoint(source, target, progress, keep_source)) as checkpoint:
        if check is not None and source.repo != DEMO:
            check(checkpoint.companions())
        yield checkpoint


def _open_checkpoint(
    source: Source, target: Path, progress: Progress, keep_source: bool
) -> Checkpoint:
    if source.repo == DEMO:
        return DemoCheckpoint(workspace(target), progress)
    path = Path(source.repo)
    work_dir = workspace(target)
    small_files = work_dir / SOURCE_DIR
    for directory in (work_dir, small_files):
        if directory.is_symlink():  # a link must not choose where files are written
            directory.unlink()
    if path.is_absolute():
        directory = path
        known = source
        files = local_files(path) if path.suffix == SUFFIX else _gguf_files(path, source.repo)
    elif snapshot := _offline_snapshot(source):
        directory = snapshot
        known = replace(source, commit=snapshot.name)
        repo, _, quantization = source.repo.partition(":")
        files = _gguf_files(snapshot, repo, quantization)
    else:
        remote = _look_up(source)
        resolved = replace(source, commit=remote.commit)
        return HubCheckpoint(remote, resolved, work_dir, keep_source=keep_source)
    if files:
        return GgufCheckpoint(files, known, small_files)
    return DirectoryCheckpoint(directory, known)


def _look_up(source: Source) -> hub.HubListing:
    """Look up the commit that the download started with, else the newest one."""
    if source.commit is not None:
        try:
            return hub.look_up(source.repo, source.commit)
        except ModelNotFoundError:  # the repo's history was rewritten
            pass
    return hub.look_up(source.repo, source.revision)


def _offline_snapshot(source: Source) -> Path | None:
    """Return the snapshot in the cache if `HF_HUB_OFFLINE` is set, else None."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        return None
    repo = source.repo.partition(":")[0]
    snapshot = cached_snapshot(repo, source.commit or source.revision)
    if snapshot and (_is_complete(snapshot) or any(_all_gguf(snapshot))):
        return snapshot
    raise HubError(
        f"{source.repo} is not complete in Hugging Face's cache, and HF_HUB_OFFLINE is set",
        hint="Unset it, or name a directory that holds the checkpoint.",
    )


def _gguf_files(directory: Path, where: str, quantization: str = "") -> dict[str, Path]:
    """Return the files of a directory's model in GGUF, none if it has safetensors."""
    if not quantization and _is_complete(directory):
        return {}
    paths = {str(path.relative_to(directory)): path for path in _all_gguf(directory)}
    chosen = choose_files(paths, quantization or None, where) if paths else {}
    return {name: paths[at] for name, at in chosen.items()}


def _all_gguf(directory: Path) -> Iterator[Path]:
    """Yield the GGUF files in a directory and in the folders in it."""
    for pattern in (f"*{SUFFIX}", f"*/*{SUFFIX}"):
        yield from directory.glob(pattern)


def _is_complete(snapshot: Path) -> bool:
    try:
        names = [path.name for path in snapshot.iterdir() if path.exists()]
        index = read_bytes(snapshot / INDEX) if INDEX in names else None
        read_weight_map(names, index, where=str(snapshot))
    except (OSError, CheckpointError):
        return False
    return True
