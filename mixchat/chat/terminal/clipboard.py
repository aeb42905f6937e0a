"""Copies text to the clipboard, by a tool of the desktop or by the terminal."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
from typing import TextIO

from mixchat.base.errors import MissingDependencyError

_LONGEST = 74_994  # bytes: all terminals that can copy take as many
_SECONDS = 5
_TOOLS = (
    ("WAYLAND_DISPLAY", ["wl-copy"]),
    ("DISPLAY", ["xclip", "-selection", "clipboard"]),
    ("DISPLAY", ["xsel", "--clipboard", "--input"]),
    (None, ["pbcopy"]),
)


def copy(text: str, terminal: TextIO) -> str:
    """Copy; return how, for a person. Raises `MissingDependencyError` where it is impossible.

    Without a desktop's tool, as over SSH, the terminal is asked to copy (OSC 52): most do, some
    need a permission in their settings, and none replies.
    """
    data = text.encode("utf-8", "replace")
    for variable, command in _TOOLS:
        if (variable is None or os.environ.get(variable)) and _done_by(command, data):
            return "copied"
    if not terminal.isatty() or len(data) > _LONGEST:
        raise MissingDependencyError(
            "no program for the clipboard was found",
            hint="Install wl-copy, xclip or xsel; /export writes a file.",
        )
    terminal.write(f"\x1b]52;c;{base64.b64encode(data).decode()}\x07")
    terminal.flush()
    return "copied through the terminal, if it allows that"


def _done_by(command: list[str], data: bytes) -> bool:
    if shutil.which(command[0]) is None:
        return False
    try:
        done = subprocess.run(
            command,
            input=data,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_SECONDS,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0
