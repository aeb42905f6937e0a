"""Small files of the system, such as /proc/meminfo, that are read again and again.

A process that strangers can reach holds them open. Otherwise it could read none of them while the
strangers' connections take all descriptors.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from mixchat.base import system

_PIECE_BYTES = 1 << 16

_held: dict[Path, int] = {}  # descriptors
_lock = threading.Lock()
_holds = False


def hold_from_now_on() -> None:
    """Hold each file open that is read from now on, until this process ends."""
    global _holds
    _holds = True


def read_text(path: Path) -> str:
    """Return the text of a file as it is now. Raises `OSError`."""
    if not _holds:
        return path.read_text(errors="replace")
    with _lock:
        descriptor = _descriptor(path)
        data = bytearray()
        piece = bytearray(_PIECE_BYTES)
        while count := os.preadv(descriptor, [piece], len(data)):
            data += piece[:count]
        return data.decode(errors="replace")


def _descriptor(path: Path) -> int:
    """Return the descriptor of a file, opened anew if another one has its place."""
    held = _held.get(path)
    if held is not None and os.path.samestat(os.stat(path), os.fstat(held)):
        return held
    try:
        opened = system.open_file(path, os.O_RDONLY)
    except OSError:
        if held is None or not path.exists():
            raise
        return held  # /proc numbers a file anew now and then, which stays the same
    if held is not None:
        os.close(held)
    _held[path] = opened
    return opened


def _forget() -> None:
    # In a forked process, a file below /proc/self would be its parent's.
    global _lock
    _lock = threading.Lock()
    for descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
