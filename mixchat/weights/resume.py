"""Fetches one large file so that what has arrived is kept, and believes only its SHA-256.

huggingface_hub starts a file anew after an interruption and compares sizes, not hashes. Here the
bytes go to `<blob>.mixchat.part`; the next attempt, also of the next process, goes on behind them.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

from mixchat.errors import CheckpointError, HubError
from mixchat.progress import Progress
from mixchat.weights.hub_errors import is_transient

_CHUNK = 1 << 20  # bytes
_TIMEOUT = 30.0  # seconds without a byte
# Seconds before each further attempt; counted anew whenever new bytes have come.
_WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)


def fetch_blob(
    url: str, blob: Path, size: int, sha256: str, *, lock: Path, progress: Progress
) -> None:
    """Fetch `url` to the path `blob`, going on behind the bytes that an earlier attempt left.

    `lock` is held meanwhile; it is huggingface_hub's own for this blob. Moves the bar by `size`
    bytes in all. Raises `CheckpointError` where the bytes are not those hashed, and whatever
    huggingface_hub raises where the last attempt fails.
    """
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    for directory in (blob.parent, lock.parent):
        directory.mkdir(parents=True, exist_ok=True)
    held = WeakFileLock(lock, timeout=1)
    try:
        held.__enter__()
    except TimeoutError:
        raise HubError(
            "another program is fetching the same file", hint="Wait until it has finished."
        ) from None
    try:
        part = blob.with_name(blob.name + ".mixchat.part")
        _Download(url, part, size, progress).run(sha256)
        os.replace(part, blob)
    finally:
        held.__exit__(None, None, None)


def verify_file(path: Path, size: int, sha256: str, progress: Progress) -> None:
    """Hash a file of the cache, moving the bar by `size` bytes.

    Raises `CheckpointError` where it is not the one expected, after removing it.
    """
    digest = hashlib.sha256()
    if path.stat().st_size == size:
        _hash_into(digest, path, progress)
    if digest.hexdigest() != sha256:
        real = path.resolve()
        path.unlink()
        real.unlink(missing_ok=True)
        raise _mismatch(path.name)


class _Download:
    """One file on its way: the part on disk, and the hash of what it holds."""

    def __init__(self, url: str, part: Path, size: int, progress: Progress) -> None:
        self.url, self.part, self.size, self.progress = url, part, size, progress
        self.done = 0
        self.digest = hashlib.sha256()

    def run(self, sha256: str) -> None:
        if self.part.exists():
            if self.part.stat().st_size > self.size:
                self.part.unlink()
            else:
                self.done = _hash_into(self.digest, self.part, self.progress)
        self.part.touch()
        waits = iter(_WAITS)
        while self.done < self.size:
            before = self.done
            failure = self._attempt()
            if self.done > before:
                waits = iter(_WAITS)
            if self.done < self.size:
                wait = next(waits, None)
                if wait is None:
                    raise failure or HubError(f"the hub sends no more bytes of {_name(self.url)}")
                time.sleep(wait)
        if self.digest.hexdigest() != sha256:
            self.part.unlink()
            raise _mismatch(_name(self.url))

    def _attempt(self) -> Exception | None:
        """Take what the hub sends; the failure if it broke off and may be tried again."""
        from huggingface_hub import errors

        http_error: type[Exception] = vars(errors)["HTTPError"]
        try:
            self._stream()
        except http_error as error:
            if not is_transient(error):
                raise
            return error
        return None

    def _stream(self) -> None:
        from huggingface_hub import get_session
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            hf_raise_for_status,
        )

        # Redirects lead to a store of blobs on another host: the client then leaves the token out.
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        if self.done:
            headers["Range"] = f"bytes={self.done}-"
        with get_session().stream(
            "GET", self.url, headers=headers, timeout=_TIMEOUT, follow_redirects=True
        ) as response:
            hf_raise_for_status(response)
            if self.done and not _continues(response.status_code, response.headers, self.done):
                self._restart()
            with open(self.part, "ab") as file:
                # As they come: a chunk of a fixed size would be lost if the connection broke.
                for chunk in response.iter_bytes():
                    if self.done + len(chunk) > self.size:
                        self._restart()
                        raise _mismatch(_name(self.url))
                    file.write(chunk)
                    self.digest.update(chunk)
                    self.done += len(chunk)
                    self.progress.advance(len(chunk))

    def _restart(self) -> None:
        os.truncate(self.part, 0)
        self.progress.advance(-self.done)
        self.done, self.digest = 0, hashlib.sha256()


def _continues(status: int, headers: object, start: int) -> bool:
    """Whether an answer goes on at byte `start`, and not from the beginning."""
    where = headers.get("Content-Range", "") if hasattr(headers, "get") else ""
    return status == 206 and str(where).startswith(f"bytes {start}-")


def _hash_into(digest: hashlib._Hash, path: Path, progress: Progress) -> int:
    """Feed the file to `digest`; its size in bytes."""
    done = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            done += len(chunk)
            progress.advance(len(chunk))
    return done


def _name(url: str) -> str:
    return url.rsplit("/", 1)[-1]


def _mismatch(name: str) -> CheckpointError:
    return CheckpointError(
        f"{name}: the bytes are not those that the hub lists (SHA-256); they were removed",
        hint="Run the same command again.",
    )
