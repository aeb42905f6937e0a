"""Runs other programs for the chat, which are the person's editor and the clipboard's tools."""

from __future__ import annotations

import base64
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from mixchat.base.errors import MissingDependencyError, UsageError
from mixchat.base.files import MAX_SIZE

_USUAL_EDITORS = ("editor", "nano", "vim", "vi", "emacs")

_MAX_COPIED_BY_TERMINAL = 74_994  # bytes, which all terminals that can copy take
_CLIPBOARD_TIMEOUT_S = 5
_CLIPBOARD_TOOLS = (  # each with the variable that tells if its desktop is there
    ("WAYLAND_DISPLAY", ["wl-copy"]),
    ("DISPLAY", ["xclip", "-selection", "clipboard"]),
    ("DISPLAY", ["xsel", "--clipboard", "--input"]),
    (None, ["pbcopy"]),
)


def edited(text: str) -> str:
    """Open `text` in the editor (`VISUAL`, `EDITOR` or a usual one). Returns it as it was saved.

    Raises `UsageError` if there is no editor, or if it fails, as with `:cq`, or leaves no UTF-8.
    Only its owner can read the temporary file, which is removed at the end.
    """
    command = _editor()
    with tempfile.TemporaryDirectory(prefix="mixchat-") as folder:
        file = Path(folder, "message.md")
        with open(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as stream:
            stream.write((text + "\n").encode("utf-8", "replace"))
        _run([*command, str(file)])
        return _read(file)


def _editor() -> list[str]:
    named = os.environ.get("VISUAL") or os.environ.get("EDITOR")
    if not named:
        named = next(filter(None, map(shutil.which, _USUAL_EDITORS)), None)
        if named is None:
            raise UsageError("no editor was found", hint="Set EDITOR to the name of one.")
        return [named]
    try:
        command = shlex.split(named)
    except ValueError as error:
        raise UsageError(f"cannot read EDITOR={named!r} ({error})") from None
    if not command:
        raise UsageError("EDITOR is blank")
    return command


def _run(command: list[str]) -> None:
    try:
        with _ctrl_c_is_the_editors():
            code = subprocess.call(command)
    except OSError as error:
        raise UsageError(f"cannot run the editor {command[0]!r} ({error.strerror})") from None
    if code != 0:
        raise UsageError(f"the editor {command[0]!r} failed: the text is unchanged")


def _read(file: Path) -> str:
    try:
        with open(file, encoding="utf-8") as stream:
            text = stream.read(MAX_SIZE)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read the editor's file ({error})") from None
    return text.removesuffix("\n")


@contextmanager
def _ctrl_c_is_the_editors() -> Iterator[None]:
    """Ignore Ctrl-C, which the terminal sends to both processes.

    The editor does not inherit a handler, but would inherit SIG_IGN.
    """
    before = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def copy(text: str, terminal: TextIO) -> str:
    """Copy to the clipboard. Returns how, in words for a person.

    Without a desktop's tool, as over SSH, the terminal is asked to copy (OSC 52). Most do, some
    need a permission in their settings, and none replies. Raises `MissingDependencyError`.
    """
    data = text.encode("utf-8", "replace")
    for variable, command in _CLIPBOARD_TOOLS:
        if (variable is None or os.environ.get(variable)) and _done_by(command, data):
            return "copied"
    if not terminal.isatty() or len(data) > _MAX_COPIED_BY_TERMINAL:
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
            timeout=_CLIPBOARD_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0
