"""Runs other programs for the chat, which are the person's editor and the clipboard's tools."""

from __future__ import annotations

import base64
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from contextlib import suppress
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
    command = _editor_command()
    with tempfile.TemporaryDirectory(prefix="mixchat-") as folder:
        file = Path(folder, "message.md")
        # Many editors give the rights of a file to their backups of it.
        with open(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as stream:
            stream.write((text + "\n").encode("utf-8", "replace"))
        # The terminal sends Ctrl-C to both processes, and it is the editor's. That does not inherit
        # a handler, but would inherit SIG_IGN.
        handler = signal.signal(signal.SIGINT, lambda number, frame: None)
        try:
            code = subprocess.call([*command, str(file)])
        except OSError as error:
            raise UsageError(f"cannot run the editor {command[0]!r} ({error.strerror})") from None
        finally:
            signal.signal(signal.SIGINT, handler)
        if code != 0:
            raise UsageError(f"the editor {command[0]!r} failed: the text is unchanged")
        try:
            with open(file, encoding="utf-8") as written:
                return written.read(MAX_SIZE).removesuffix("\n")
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot read the editor's file ({error})") from None


def _editor_command() -> list[str]:
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


def copy(text: str, terminal: TextIO) -> str:
    """Copy to the clipboard. Returns how, in words for a person.

    Without a desktop's tool, as over SSH, the terminal is asked to copy (OSC 52). Most do, some
    need a permission in their settings, and none replies. Raises `MissingDependencyError`.
    """
    data = text.encode("utf-8", "replace")
    for variable, command in _CLIPBOARD_TOOLS:
        if (variable and not os.environ.get(variable)) or shutil.which(command[0]) is None:
            continue
        with suppress(OSError, subprocess.SubprocessError):
            # xclip keeps the ends of pipes open, so it gets none.
            subprocess.run(
                command,
                input=data,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=_CLIPBOARD_TIMEOUT_S,
                check=True,
            )
            return "copied"
    if not terminal.isatty() or len(data) > _MAX_COPIED_BY_TERMINAL:
        raise MissingDependencyError(
            "no program for the clipboard was found",
            hint="Install wl-copy, xclip or xsel; /export writes a file.",
        )
    terminal.write(f"\x1b]52;c;{base64.b64encode(data).decode()}\x07")
    terminal.flush()
    return "copied through the terminal, if it allows that"
