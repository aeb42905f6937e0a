"""Looks up a checkpoint on the hub, with its files and the headers of its shards."""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Event
from typing import Any
from urllib.parse import quote

from mixchat.base.errors import CheckpointError, HubError
from mixchat.base.files import MAX_SIZE, json_object, read_bytes
from mixchat.base.progress import in_background
from mixchat.base.safetensors import Header, header_length
from mixchat.install.source.checkpoint_index import (
    CONFIG,
    INDEX,
    SINGLE,
    CheckpointIndex,
    read_weight_map,
    shard_files,
)
from mixchat.install.source.gguf_checkpoint import SUFFIX, choose_files, read_gguf
from mixchat.install.source.gguf_file import MAGIC, read_header
from mixchat.install.source.hub_errors import endpoint, plain_errors
from mixchat.install.source.hub_request import read_json
from mixchat.install.source.remote_file import RemoteFile
from mixchat.install.source.transfer import read_range
from mixchat.weights.families.read_config import read_config
from mixchat.weights.format.own_files import COMPANION_FILES

_SHARD_BYTES_MAX = 50_000_000_000  # larger files are not served over plain HTTP
_FIRST_READ_BYTES = 1 << 16  # a shard's header has some thousand bytes
_REQUESTS_AT_ONCE = 8
_SHA1 = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PLAIN = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}"
_GGUF_PATH = re.compile(rf"{_PLAIN}/{_PLAIN}\.gguf")


@dataclass(frozen=True)
class HubListing:
    """The files of one commit that make up a checkpoint, and its tensors."""

    repo_id: str
    commit: str
    small: tuple[RemoteFile, ...]
    read: dict[str, bytes]  # the small files that were read already
    shards: dict[str, RemoteFile]
    index: CheckpointIndex
    # Small files that are made of the metadata of a model in GGUF.
    metadata_files: dict[str, bytes] = field(default_factory=dict)


def look_up(repo_id: str, revision: str | None = None) -> HubListing:
    """Look up the files of a checkpoint, and fetch its config, its index and the headers.

    `repo_id` may end with the kind of a model in GGUF, as in ORG/NAME:Q4_K_M. Without it, a repo's
    safetensors precede. Raises `ModelNotFoundError` if the hub has no such repo, `CheckpointError`
    if it is no model that runs, `UsageError` if it has several models in GGUF, `HubError` if the
    hub cannot be reached.
    """
    name, _, gguf_kind = repo_id.partition(":")
    with plain_errors(name):
        commit, listing = _listing(name, revision)
        has_safetensors = INDEX in listing or SINGLE in listing
        if gguf_kind or (not has_safetensors and any(file.endswith(SUFFIX) for file in listing)):
            chosen = choose_files(listing, gguf_kind or None, name)
            shards = {shard: _check_shard(listing[path]) for shard, path in chosen.items()}
            index, metadata = read_gguf(_headers(shards), repo_id)
            return HubListing(name, commit, (), {}, shards, index, metadata)
        if CONFIG not in listing:
            raise CheckpointError(f"{repo_id}: there is no {CONFIG}: not a checkpoint for mixchat")
        read = {CONFIG: fetch_small(listing[CONFIG])}
        config = read_config(json_object(read[CONFIG], listing[CONFIG].where))
        if INDEX in listing:
            read[INDEX] = fetch_small(listing[INDEX])
        weight_map = read_weight_map(listing, read.get(INDEX), where=repo_id)
        shards = {name: _check_shard(listing[name]) for name in shard_files(weight_map)}
        small = tuple(listing[name] for name in (*COMPANION_FILES, INDEX) if name in listing)
        for file in small:
            _check_small(file)
        headers = _headers(shards)
    tensors = CheckpointIndex(config, headers, weight_map, repo_id)
    return HubListing(repo_id, commit, small, read, shards, tensors)


def fetch_small(file: RemoteFile) -> bytes:
    """Return the content of a small file, from the cache or the hub. Raises `HubError`."""
    _check_small(file)
    # huggingface_hub checks only sizes. A file of its cache is used if its hash is right.
    with suppress(CheckpointError):
        path = file.cached()
        if path and _has_listed_bytes(data := read_bytes(path), file):
            return data
    data = bytes(read_range(file.url, 0, file.size, Event(), file_size=file.size))
    if not _has_listed_bytes(data, file):
        raise HubError(
            f"{file.where} is not the file that the hub lists", hint="Run the same command again."
        )
    return data


def _has_listed_bytes(data: bytes, file: RemoteFile) -> bool:
    if file.sha256 is not None:
        return hashlib.sha256(data).hexdigest() == file.sha256
    if file.git_sha1 is not None:
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == file.git_sha1
    return len(data) == file.size


def _headers(shards: dict[str, RemoteFile]) -> dict[str, Any]:
    stop = Event()

    def read(names: list[str]) -> dict[str, Header]:
        return {name: _header(shards[name], stop) for name in names}

    # Several headers are read at once, because Mixtral has 19 shards, and each request waits for
    # the hub.
    names = list(shards)
    try:
        futures = [
            in_background(read, names[n::_REQUESTS_AT_ONCE]) for n in range(_REQUESTS_AT_ONCE)
        ]
        return {name: header for future in futures for name, header in future.result().items()}
    finally:
        stop.set()


def _header(file: RemoteFile, stop: Event) -> Header:
    url = file.url
    first = bytearray()

    def read(start: int, size: int) -> bytearray:
        nonlocal first
        piece = read_range(url, start, size, stop, file_size=file.size)
        first += piece
        return piece

    is_gguf = file.path.endswith(SUFFIX)
    try:
        if is_gguf:
            return read_header(read, file.size, file.where)
        read(0, min(_FIRST_READ_BYTES, file.size))
        end = 8 + header_length(first, file.size, file.where)
        if end > len(first):
            read(len(first), end - len(first))
        return Header(first[8:end], file.size, file.where)
    except CheckpointError:
        if is_gguf and first.startswith(MAGIC):
            raise
    raise HubError(
        f"the hub sends something else in place of {file.where}: no header of "
        f"{'GGUF' if is_gguf else 'safetensors'}",
        hint="Does the network ask for a login first? Then log in and run the same command again. "
        "If not, the file on the hub is damaged.",
    )


def _check_shard(file: RemoteFile) -> RemoteFile:
    if file.sha256 is None:
        raise CheckpointError(f"{file.repo_id}: the hub lists no SHA-256 for {file.path}")
    if file.size > _SHARD_BYTES_MAX:
        raise CheckpointError(
            f"{file.where} is too large to be fetched over HTTP",
            hint="Fetch it with 'hf download', and name the directory that it is in.",
        )
    return file


def _listing(repo_id: str, revision: str | None) -> tuple[str, dict[str, RemoteFile]]:
    """Return the commit of `revision` today, and its files by name.

    Of files in folders only models in GGUF are listed.
    """
    branch = "" if revision is None else f"/revision/{quote(revision, safe='')}"
    files: dict[str, RemoteFile] = {}
    try:
        info = read_json(f"{endpoint()}/api/models/{repo_id}{branch}?blobs=true")
        commit = str(info["sha"])
        for sibling in info["siblings"]:
            path = sibling["rfilename"]
            if "/" in path and not _GGUF_PATH.fullmatch(path):
                continue
            size, lfs, sha1 = (sibling.get(key) for key in ("size", "lfs", "blobId"))
            sha256 = lfs["sha256"] if lfs else None
            # The hashes become names in the cache, so nothing but hexadecimal digits is taken.
            if type(size) is not int or size < 0 or not (sha1 is None or _SHA1.fullmatch(sha1)):
                raise ValueError(path)
            if sha256 is None:
                files[path] = RemoteFile(repo_id, commit, path, size, None, sha1)
            elif _SHA256.fullmatch(sha256):
                files[path] = RemoteFile(repo_id, commit, path, size, sha256, None)
            else:
                raise ValueError(path)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        commit = ""
    if not _SHA1.fullmatch(commit):
        raise HubError(
            f"the hub's answer for {repo_id} is not valid",
            hint="Is HF_ENDPOINT the address of a hub? Does the network ask for a login first?",
        )
    return commit, files


def _check_small(file: RemoteFile) -> None:
    if file.size > MAX_SIZE:
        raise CheckpointError(f"{file.where} is far too large for a file of its kind")
