"""Fetches a checkpoint from the hub into huggingface_hub's own cache: listed, resumable, hashed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixchat.config import ModelConfig
from mixchat.errors import CheckpointError, HubError
from mixchat.progress import Progress
from mixchat.weights.checkpoint_files import (
    COMPANION_FILES,
    CONFIG,
    INDEX,
    MAX_COMPANION_FILE,
    weight_files,
)
from mixchat.weights.hub_errors import endpoint, plain_errors
from mixchat.weights.resume import fetch_blob, verify_file

_LISTING_TIMEOUT = 30.0  # seconds
# The hub does not serve larger files over plain HTTP; huggingface_hub itself then uses Xet.
_MAX_PLAIN_HTTP = 50_000_000_000
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class RemoteFile:
    """A file on the hub: its name, its size in bytes, its SHA-256 where the hub lists one."""

    path: str
    size: int
    sha256: str | None


@dataclass(frozen=True)
class RemoteCheckpoint:
    """The files of one commit that make up a checkpoint, and the shape its config.json gives."""

    repo_id: str
    commit: str
    files: tuple[RemoteFile, ...]
    config: ModelConfig

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)


def plan(repo_id: str, revision: str | None = None) -> RemoteCheckpoint:
    """Look up what has to be fetched; only config.json and the index of the shards are.

    Raises `ModelNotFoundError` where the hub has no such repo, `CheckpointError` where it is not a
    Mixtral in safetensors, `HubError` where the hub cannot be reached or refuses.
    """
    with plain_errors(repo_id):
        commit, listing = _listing(repo_id, revision)
        if CONFIG not in listing:
            raise CheckpointError(f"{repo_id}: there is no {CONFIG}: not a checkpoint for mixchat")
        config = ModelConfig.from_file(_fetch_small(repo_id, commit, listing[CONFIG]))
        index = None
        if INDEX in listing:
            index = _fetch_small(repo_id, commit, listing[INDEX]).read_bytes()
        weights = weight_files(listing, index, where=repo_id)
    small = [name for name in (*COMPANION_FILES, INDEX) if name in listing]
    files = tuple(listing[name] for name in (*small, *weights))
    for name in small:
        _check_small(repo_id, listing[name])
    return RemoteCheckpoint(repo_id, commit, files, config)


def missing_bytes(remote: RemoteCheckpoint) -> int:
    """Bytes of `remote` that are not yet in the cache."""
    return sum(_missing(remote, file) for file in remote.files)


def fetch(
    remote: RemoteCheckpoint,
    *,
    progress: Progress,
    check: Callable[[Path], None] = lambda checkpoint: None,
) -> Path:
    """Bring every file of `remote` into the cache and return the directory that holds them.

    Files are fetched one after the other in this thread, so that Ctrl-C stops at once; a file cut
    off goes on where it stopped the next time. `check` is called with the directory once the small
    files are in it, and may raise. Files that the hub lists with a SHA-256 are hashed,
    also those that were in the cache already. Raises `HubError`; `CheckpointError` where a hash
    differs; `ResourceError` where the disk is full.
    """
    progress.begin(f"fetching {remote.repo_id}", remote.total)
    try:
        with plain_errors(remote.repo_id):
            small = [file for file in remote.files if not file.path.endswith(".safetensors")]
            for file in small:
                _fetch(remote, file, progress)
            check(_snapshot(remote))
            for file in remote.files:
                if file not in small:
                    _fetch(remote, file, progress)
    finally:
        progress.end()
    return _snapshot(remote)


def cache_dir() -> Path:
    """huggingface_hub's cache: `HF_HUB_CACHE`, or below `HF_HOME`."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _fetch(remote: RemoteCheckpoint, file: RemoteFile, progress: Progress) -> None:
    pointer, blob = _snapshot(remote) / file.path, _blob(remote, file)
    if blob is None or file.sha256 is None:
        _fetch_small(remote.repo_id, remote.commit, file)
        progress.advance(file.size)
        return
    if pointer.exists():
        verify_file(pointer, file.size, file.sha256, progress)
        return
    if blob.exists():
        verify_file(blob, file.size, file.sha256, progress)
    elif file.size > _MAX_PLAIN_HTTP:
        path = _download(remote.repo_id, remote.commit, file)
        verify_file(path, file.size, file.sha256, progress)
        return
    else:
        from huggingface_hub import hf_hub_url

        url = hf_hub_url(remote.repo_id, file.path, revision=remote.commit, endpoint=endpoint())
        lock = cache_dir() / ".locks" / _repo_dir(remote).name / f"{file.sha256}.lock"
        fetch_blob(url, blob, file.size, file.sha256, lock=lock, progress=progress)
    # The cache's documented layout: snapshots/<commit>/<name> links to blobs/<hash>.
    pointer.parent.mkdir(parents=True, exist_ok=True)
    pointer.unlink(missing_ok=True)
    pointer.symlink_to(os.path.relpath(blob, pointer.parent))


def _fetch_small(repo_id: str, commit: str, file: RemoteFile) -> Path:
    _check_small(repo_id, file)
    path = _download(repo_id, commit, file)
    if path.stat().st_size != file.size:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise CheckpointError(
            f"{repo_id}: {file.path} is not the size that the hub lists; it was removed",
            hint="Run the same command again.",
        )
    return path


def _download(repo_id: str, commit: str, file: RemoteFile) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(
        hf_hub_download(
            repo_id, file.path, revision=commit, endpoint=endpoint(), cache_dir=cache_dir()
        )
    )


def _listing(repo_id: str, revision: str | None) -> tuple[str, dict[str, RemoteFile]]:
    """The commit that `revision` stands for now, and the files at its top level by name."""
    from huggingface_hub import HfApi

    try:
        info = HfApi(endpoint=endpoint()).model_info(
            repo_id, revision=revision, files_metadata=True, timeout=_LISTING_TIMEOUT
        )
        commit = str(info.sha)
        files = {file.path: file for file in _remote_files(info.siblings or ())}
    except (ValueError, KeyError, TypeError, AttributeError):
        commit, files = "", {}
    if not _COMMIT.fullmatch(commit):
        raise HubError(
            f"the answer for {repo_id} cannot be understood",
            hint="Is HF_ENDPOINT the address of a hub? Does the network ask for a login first?",
        )
    return commit, files


def _remote_files(siblings: Iterable[Any]) -> Iterable[RemoteFile]:
    for sibling in siblings:
        name, size, lfs = sibling.rfilename, sibling.size, sibling.lfs
        if "/" in name:
            continue
        sha256 = lfs["sha256"] if lfs else None
        if type(size) is not int or size < 0 or not (sha256 is None or _SHA256.fullmatch(sha256)):
            raise ValueError(name)
        yield RemoteFile(name, size, sha256)


def _check_small(repo_id: str, file: RemoteFile) -> None:
    if file.path in (*COMPANION_FILES, INDEX) and file.size > MAX_COMPANION_FILE:
        raise CheckpointError(f"{repo_id}: {file.path} is far too large to be what it should be")


def _missing(remote: RemoteCheckpoint, file: RemoteFile) -> int:
    blob = _blob(remote, file)
    if (_snapshot(remote) / file.path).exists() or (blob is not None and blob.exists()):
        return 0
    return file.size


def _blob(remote: RemoteCheckpoint, file: RemoteFile) -> Path | None:
    return _repo_dir(remote) / "blobs" / file.sha256 if file.sha256 else None


def _snapshot(remote: RemoteCheckpoint) -> Path:
    return _repo_dir(remote) / "snapshots" / remote.commit


def _repo_dir(remote: RemoteCheckpoint) -> Path:
    return cache_dir() / ("models--" + remote.repo_id.replace("/", "--"))
