"""A checkpoint on the hub: its files at one commit, and the headers of its shards."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from mixchat.background import in_background
from mixchat.errors import CheckpointError, HubError
from mixchat.files import MAX_SIZE, read_bytes
from mixchat.model_config import ModelConfig
from mixchat.safetensors import Header, header_length
from mixchat.weights.source.checkpoint_files import (
    COMPANION_FILES,
    CONFIG,
    INDEX,
    read_weight_map,
    shard_files,
)
from mixchat.weights.source.checkpoint_index import CheckpointIndex
from mixchat.weights.source.hub_errors import endpoint, plain_errors
from mixchat.weights.source.transfer import read_range

_LISTING_TIMEOUT = 30.0  # seconds
# Larger files are not served over plain HTTP.
_MAX_SHARD = 50_000_000_000
_FIRST_READ = 1 << 16  # bytes; a shard's header is some thousand
_AT_ONCE = 8  # requests
COMMIT = re.compile(r"[0-9a-f]{40}")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]{0,200}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a commit on the hub: its size in bytes, and its SHA-256 if it is large (LFS).

    `git_sha1` is the hash by which git names a small one.
    """

    repo_id: str
    commit: str
    path: str
    size: int
    sha256: str | None
    git_sha1: str | None

    @property
    def where(self) -> str:
        """Return its name for messages."""
        return f"{self.repo_id}: {self.path}"

    @property
    def url(self) -> str:
        """Return its URL."""
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.repo_id, self.path, revision=self.commit, endpoint=endpoint())

    @property
    def blob(self) -> Path:
        """Return the path of a large file in huggingface_hub's cache, by its hash."""
        return repo_dir(self.repo_id) / "blobs" / str(self.sha256)

    @property
    def pointer(self) -> Path:
        """Return the path of the link to the blob in that cache, by its commit and name."""
        return snapshot_dir(self.repo_id, self.commit) / self.path


@dataclass(frozen=True)
class HubListing:
    """The files of one commit that make up a checkpoint, and its tensors."""

    repo_id: str
    commit: str
    small: tuple[RemoteFile, ...]
    shards: dict[str, RemoteFile]
    index: CheckpointIndex


def look_up(repo_id: str, revision: str | None = None) -> HubListing:
    """Look up the files of a checkpoint; fetch its config, its index and the shards' headers.

    Raises `ModelNotFoundError` where the hub has no such repo, `CheckpointError` where it is not a
    Mixtral in safetensors, `HubError` where the hub cannot be reached or refuses.
    """
    with plain_errors(repo_id):
        commit, listing = _listing(repo_id, revision)
        if CONFIG not in listing:
            raise CheckpointError(f"{repo_id}: there is no {CONFIG}: not a checkpoint for mixchat")
        config = ModelConfig.from_file(fetch_small(listing[CONFIG]))
        index = read_bytes(fetch_small(listing[INDEX])) if INDEX in listing else None
        weight_map = read_weight_map(listing, index, where=repo_id)
        shards = {name: _check_shard(listing[name]) for name in shard_files(weight_map)}
        small = tuple(listing[name] for name in (*COMPANION_FILES, INDEX) if name in listing)
        for file in small:
            _check_small(file)
        headers = _headers(shards)
    tensors = CheckpointIndex(config, headers, weight_map, repo_id)
    return HubListing(repo_id, commit, small, shards, tensors)


def fetch_small(file: RemoteFile) -> Path:
    """Return a small file in huggingface_hub's cache, checked; a damaged one is fetched again.

    Raises `HubError` where the hub sends another file than it lists.
    """
    _check_small(file)
    for again in (False, True):
        path = _into_cache(file, again=again)
        if _has_listed_bytes(path, file):
            return path
    _discard_damaged(path)
    raise HubError(
        f"{file.where} is not the file that the hub lists",
        hint="Run the same command again.",
    )


def cache_dir() -> Path:
    """Return huggingface_hub's cache: `HF_HUB_CACHE`, or a directory below `HF_HOME`."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def snapshot_dir(repo_id: str, commit: str) -> Path:
    """Return the directory of that cache with the files of one commit."""
    return repo_dir(repo_id) / "snapshots" / commit


def repo_dir(repo_id: str) -> Path:
    """Return the directory of that cache with all of a repo."""
    return cache_dir() / ("models--" + repo_id.replace("/", "--"))


def write_ref(repo_id: str, revision: str | None, commit: str) -> None:
    """Record in the cache the commit of a branch or tag, so that it can be found offline."""
    from huggingface_hub import constants

    name = revision or constants.DEFAULT_REVISION
    if name != commit and _REVISION.fullmatch(name) and ".." not in name:
        ref = repo_dir(repo_id) / "refs" / name
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit)


@contextmanager
def blob_lock(repo: str, sha256: str, *, timeout: float) -> Iterator[None]:
    """Hold huggingface_hub's own lock of a blob in the cache, which other tools respect, too.

    `repo` is the name of its directory. Raises `TimeoutError` after `timeout` seconds.
    """
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    path = cache_dir() / ".locks" / repo / f"{sha256}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(path, timeout=timeout):
        yield


def _into_cache(file: RemoteFile, *, again: bool) -> Path:
    from huggingface_hub import hf_hub_download

    return Path(
        hf_hub_download(
            file.repo_id,
            file.path,
            revision=file.commit,
            force_download=again,
            endpoint=endpoint(),
            cache_dir=cache_dir(),
        )
    )


def _has_listed_bytes(path: Path, file: RemoteFile) -> bool:
    data = read_bytes(path)
    if file.sha256 is not None:
        return hashlib.sha256(data).hexdigest() == file.sha256
    if file.git_sha1 is not None:
        return _git_sha1(data) == file.git_sha1
    return len(data) == file.size


def _git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _discard_damaged(path: Path) -> None:
    """Remove a file from the cache, unless its bytes have the hash after which it is named.

    One that has that hash is good, whatever the hub lists.
    """
    real, data = path.resolve(), read_bytes(path)
    if real.name in (hashlib.sha256(data).hexdigest(), _git_sha1(data)):
        return
    path.unlink()
    if cache_dir().resolve() in real.parents:
        real.unlink(missing_ok=True)


def _headers(shards: dict[str, RemoteFile]) -> dict[str, Header]:
    """Return the headers of all shards: one or two requests for each, several at once."""
    stop = Event()

    def read(names: list[str]) -> dict[str, Header]:
        return {name: _header(shards[name], stop) for name in names}

    names = list(shards)
    try:
        futures = [in_background(read, names[n::_AT_ONCE]) for n in range(_AT_ONCE)]
        return {name: header for future in futures for name, header in future.result().items()}
    finally:
        stop.set()


def _header(file: RemoteFile, stop: Event) -> Header:
    url = file.url
    first = read_range(url, 0, min(_FIRST_READ, file.size), stop, of=file.size)
    end = 8 + header_length(first, file.size, file.where)
    if end > len(first):
        first += read_range(url, len(first), end - len(first), stop, of=file.size)
    return Header(first[8:end], file.size, file.where)


def _check_shard(file: RemoteFile) -> RemoteFile:
    if file.sha256 is None:
        raise CheckpointError(f"{file.repo_id}: the hub lists no SHA-256 for {file.path}")
    if file.size > _MAX_SHARD:
        raise CheckpointError(
            f"{file.where} is too large to be fetched over HTTP",
            hint="Fetch it with `hf download`, and name the directory that it is in.",
        )
    return file


def _listing(repo_id: str, revision: str | None) -> tuple[str, dict[str, RemoteFile]]:
    """Return the commit of `revision` today, and the files at its top level by name."""
    from huggingface_hub import HfApi

    try:
        info = HfApi(endpoint=endpoint()).model_info(
            repo_id, revision=revision, files_metadata=True, timeout=_LISTING_TIMEOUT
        )
        commit = str(info.sha)
        files = {file.path: file for file in _remote_files(repo_id, commit, info.siblings or ())}
    except (ValueError, KeyError, TypeError, AttributeError):
        commit, files = "", {}
    if not COMMIT.fullmatch(commit):
        raise HubError(
            f"the hub's answer for {repo_id} is not valid",
            hint="Is HF_ENDPOINT the address of a hub? Does the network ask for a login first?",
        )
    return commit, files


def _remote_files(repo_id: str, commit: str, siblings: Iterable[Any]) -> Iterable[RemoteFile]:
    for sibling in siblings:
        name, size, lfs = sibling.rfilename, sibling.size, sibling.lfs
        if "/" in name:
            continue
        sha256, sha1 = lfs["sha256"] if lfs else None, sibling.blob_id
        if type(size) is not int or size < 0 or not (sha256 is None or _SHA256.fullmatch(sha256)):
            raise ValueError(name)
        yield RemoteFile(repo_id, commit, name, size, sha256, sha1 if sha256 is None else None)


def _check_small(file: RemoteFile) -> None:
    if file.size > MAX_SIZE:
        raise CheckpointError(f"{file.where} is far too large for a file of its kind")
