"""Opens a text in the user's editor."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mixchat.base.errors import UsageError
from mixchat.base.files import MAX_SIZE

_USUAL = ("editor", "nano", "vim", "vi", "emacs")


def edited(text: str) -> str:
    """Open `text` in the editor (`VISUAL`, `EDITOR` or a usual one); return it as it was saved.

    Raises `UsageError` where there is no editor or it fails, as with `:cq`, or leaves no UTF-8.
    Only its owner can read the temporary file, which is removed at the end.
    """
    command = _command()
    with tempfile.TemporaryDirectory(prefix="mixchat-") as folder:
        file = Path(folder, "message.md")
        with open(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600), "wb") as stream:
            stream.write((text + "\n").encode("utf-8", "replace"))
        _run([*command, str(file)])
        return _read(file)


def _command() -> list[str]:
    named = os.environ.get("VISUAL") or os.environ.get("EDITOR")
    if not named:
        named = next(filter(None, map(shutil.which, _USUAL)), None)
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
