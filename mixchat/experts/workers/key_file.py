"""The key of both ends, in a file that only its owner can read."""

from __future__ import annotations

import os
import re
import secrets
import stat
from pathlib import Path

from mixchat.base.errors import UsageError
from mixchat.base.files import open_regular, removed_on_error, write_error
from mixchat.base.settings import data_dir

KEY_SIZE = 32  # bytes

_MAX_FILE = 4096  # bytes that are read
_MODE = 0o600
_OTHERS = 0o077  # the mode's bits for others than the owner


def default_key_file() -> Path:
    """Return the path of the key if none is named."""
    return data_dir() / "worker.key"


def make_key_file(path: Path) -> None:
    """Write a new random key. Raises `UsageError` if there is a file."""
    if os.path.lexists(path):
        hint = "Copy it to the other machines; or remove it, to make another for all of them."
        raise UsageError(f"{path}: there is a key already", hint=hint)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _MODE)
        with removed_on_error(path), open(descriptor, "wb") as file:
            file.write(secrets.token_hex(KEY_SIZE).encode() + b"\n")
            file.flush()
            os.fsync(descriptor)
    except OSError as error:  # also if another process has made a key meanwhile
        raise write_error(error, path, "cannot be written") from None


def read_key_file(path: Path) -> bytes:
    """Return the key, 32 bytes. Raises `UsageError` if it is missing, damaged or open to others."""
    try:
        with open(open_regular(path), "rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            text = file.read(_MAX_FILE)
    except FileNotFoundError:
        hint = "Make it with 'mixchat worker --new-key', and copy it to each of the machines."
        raise UsageError(f"{path}: there is no key", hint=hint) from None
    except OSError as error:
        raise UsageError(f"{path}: the key cannot be read ({error.strerror})") from None
    if mode & _OTHERS:
        hint = f"Change that with `chmod 600 {path}`."
        raise UsageError(f"{path}: others can read the key (its mode is {mode:o})", hint=hint)
    if not re.fullmatch(rb"[0-9a-fA-F]{%d}" % (2 * KEY_SIZE), text.strip()):
        hint = "Copy the file again, or make another with 'mixchat worker --new-key'."
        raise UsageError(f"{path}: not a key (64 hexadecimal digits)", hint=hint)
    return bytes.fromhex(text.decode())
