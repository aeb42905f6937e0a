"""Fetches a file from the hub, resumed after an interruption, or a range of one.

huggingface_hub restarts a file after an interruption and compares no hashes. Here the bytes go to
`<file>.mixchat.part`, and the next attempt continues after them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

from mixchat.base.errors import HubError
from mixchat.base.files import open_regular, rename_durably
from mixchat.base.http import FAULTS
from mixchat.base.progress import Task
from mixchat.install.source.checkpoint import Stopped
from mixchat.install.source.hub_errors import HubRefusal, is_transient
from mixchat.install.source.hub_request import RemoteBytes, WrongAnswer, retry_after
from mixchat.weights.format.workspace import PART_SUFFIX

_CHUNK_BYTES = 1 << 20
_SYNC_BYTES = 1 << 28  # that a power cut can undo
# After this progress a file's attempts are counted from 0 again: bytes, or a part of a small file.
# Without it, attempts through a proxy that always breaks after a few bytes would never end.
_PROGRESS_BYTES = 1 << 16
_PROGRESS_PARTS = 100
# The pauses before each further attempt.
_WAITS_S = (1.0, 2.0, 4.0, 8.0, 16.0)


def part_path(path: Path) -> Path:
    """Return the path of a file's bytes until all have come."""
    return path.with_name(path.name + PART_SUFFIX)


def fetch_file(url: str, path: Path, size: int, sha256: str, task: Task, stop: Event) -> None:
    """Fetch `url` to `path`, resuming after the bytes of an earlier attempt.

    Advances `task` by the bytes that come. Raises `HubError` if they have another SHA-256,
    `Stopped` once `stop` is set, and the `FAULTS` of a connection.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = part_path(path)
    if partial.is_symlink() or not partial.is_file():  # a planted link must not be followed
        partial.unlink(missing_ok=True)
    # A power cut may have damaged the bytes of an earlier attempt.
    attempts = 2 if partial.exists() else 1
    for _ in range(attempts):
        if _Download(url, partial, size, task, stop).run(sha256):
            rename_durably(partial, path)
            return
    raise wrong_bytes(path.name)


def is_intact(path: Path, size: int, sha256: str, stop: Event) -> bool:
    """Return whether a file has the expected size and SHA-256."""
    digest = hashlib.sha256()
    if path.stat().st_size == size:
        _hash_into(digest, path, stop)
    return digest.hexdigest() == sha256


def read_range(
    url: str, start: int, size: int, stop: Event, *, file_size: int | None = None
) -> bytearray:
    """Return `size` bytes of `url` from byte `start` on. file_size: None if unknown.

    Raises as `fetch_file` does.
    """
    got = bytearray()
    remote = RemoteBytes(url, file_size)

    def attempt() -> None:
        with remote.stream(start + len(got), start + size - 1) as (reply, first):
            skip = start + len(got) - first  # bytes to skip if the hub sends the whole file
            for chunk in reply.pieces():
                if stop.is_set():
                    raise Stopped
                fresh = chunk[skip : skip + size - len(got)]
                skip = max(0, skip - len(chunk))
                got.extend(fresh)
                if len(got) == size:
                    return

    _retry(attempt, lambda: len(got), size, stop, remote.name)
    return got


def fetch_and_discard(url: str, task: Task, stop: Event) -> None:
    """Fetch `url` and discard the bytes, until `stop` is set."""
    with RemoteBytes(url, None).stream(0, None) as (reply, _):
        for chunk in reply.pieces():
            task.advance(len(chunk))
            if stop.is_set():
                return


def wrong_bytes(name: str) -> HubError:
    """Return the error for a file that had the wrong hash and was removed."""
    return HubError(
        f"{name}: the bytes differ from those that the hub lists (SHA-256); they were removed",
        hint="Run the same command again.",
    )


class _Download:
    def __init__(self, url: str, partial: Path, size: int, task: Task, stop: Event) -> None:
        self._part = partial
        self._size = size
        self._remote = RemoteBytes(url, size)
        self._task = task
        self._stop = stop
        self._done = self._synced = 0
        self._digest = hashlib.sha256()

    def run(self, sha256: str) -> bool:
        """Fetch the missing bytes. Remove all and return False if the hash is wrong."""
        if self._part.exists():
            if self._part.stat().st_size > self._size:
                self._part.unlink()
            else:
                self._done = _hash_into(self._digest, self._part, self._stop)
        self._part.touch()
        _retry(self._attempt, lambda: self._done, self._size, self._stop, self._remote.name)
        if self._digest.hexdigest() == sha256:
            return True
        self._restart()
        self._part.unlink()
        return False

    def _attempt(self) -> None:
        with self._remote.stream(self._done, None) as (reply, first):
            # If the hub sends the whole file, the bytes that are there stay, and the same bytes are
            # skipped.
            known = self._done - first  # bytes of the answer that are there already
            with open(self._part, "ab", buffering=0) as file:
                # With chunks of a fixed size, a broken connection would lose the last bytes.
                for chunk in reply.pieces():
                    known, chunk = max(0, known - len(chunk)), chunk[known:]
                    if self._done + len(chunk) > self._size:
                        self._restart()
                        raise wrong_bytes(self._remote.name)
                    self._take(file, chunk)
                os.fsync(file.fileno())

    def _take(self, file: Any, chunk: bytes) -> None:
        if self._stop.is_set():
            raise Stopped
        view = memoryview(chunk)
        while view:
            written = file.write(view)
            self._digest.update(view[:written])
            self._done += written
            self._task.advance(written)
            view = view[written:]
        if self._done - self._synced > _SYNC_BYTES:
            os.fsync(file.fileno())
            self._synced = self._done

    def _restart(self) -> None:
        os.truncate(self._part, 0)
        self._task.advance(-self._done)
        self._done = self._synced = 0
        self._digest = hashlib.sha256()


def _retry(
    attempt: Callable[[], None], done: Callable[[], int], size: int, stop: Event, name: str
) -> None:
    """Repeat `attempt` until `done` is `size`. The pauses start short again after progress.

    Few bytes, and bytes that are fetched a second time, do not count as progress. Otherwise it
    could repeat for ever.
    """
    waits = iter(_WAITS_S)
    most = done()
    progress = min(_PROGRESS_BYTES, size // _PROGRESS_PARTS)
    while done() < size:
        failure: Exception | None = None
        try:
            attempt()
        except WrongAnswer as error:
            failure = error
        except (HubRefusal, *FAULTS) as error:
            if not is_transient(error):
                raise
            failure = error
        if done() > most + progress:
            waits = iter(_WAITS_S)
            most = done()
        if done() >= size:
            return
        wait = next(waits, None)
        if wait is None:
            raise failure or HubError(f"the hub sends no more bytes of {name}")
        if stop.wait(max(wait, retry_after(failure))):
            raise Stopped


def _hash_into(digest: hashlib._Hash, path: Path, stop: Event) -> int:
    done = 0
    with open(open_regular(path), "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            if stop.is_set():
                raise Stopped
            digest.update(chunk)
            done += len(chunk)
    return done
