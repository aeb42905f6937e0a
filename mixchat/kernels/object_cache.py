"""Machine code that was made before, in files: compiling it takes half a second of every start."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from pathlib import Path

import llvmlite

from mixchat.files import write_private_file
from mixchat.settings import data_dir

_DIGEST = hashlib.sha256().digest_size
_KEPT = 64  # files: those of some versions and models
_ABANDONED = 3600  # seconds after which nobody writes a file any more


class ObjectCache:
    """The machine code of one module, for one CPU and one compiler.

    A file is a SHA-256 and what it is of. Whoever can write into the directory can run code as its
    owner: it is made for its owner alone, and another one is not used.
    """

    def __init__(self, source: str, target: str, directory: Path | None = None) -> None:
        """`source`: the module's text; `target`: all else that the code depends on."""
        known = "\0".join((source, target, llvmlite.__version__))
        self._directory = data_dir() / "kernels" if directory is None else directory
        self._path = self._directory / f"{hashlib.sha256(known.encode()).hexdigest()}.o"

    def load(self) -> bytes | None:
        """The code, if it is there and whole."""
        try:
            if not _is_private(self._directory):
                return None
            content = self._path.read_bytes()
        except OSError:
            return None
        digest, code = content[:_DIGEST], content[_DIGEST:]
        return code if hashlib.sha256(code).digest() == digest else None

    def save(self, code: bytes) -> None:
        """Keep the code, where that is possible; of too many files the oldest go."""
        with contextlib.suppress(OSError):
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if _is_private(self._directory):
                write_private_file(self._path, hashlib.sha256(code).digest() + code)
                self._sweep()

    def _sweep(self) -> None:
        files = sorted(self._directory.glob("*.o"), key=lambda path: path.stat().st_mtime)
        old = time.time() - _ABANDONED
        left = [path for path in self._directory.glob("*.tmp") if path.stat().st_mtime < old]
        for path in [*files[:-_KEPT], *left]:
            path.unlink(missing_ok=True)


def _is_private(directory: Path) -> bool:
    status = directory.stat()
    return status.st_uid == os.getuid() and not status.st_mode & 0o022
