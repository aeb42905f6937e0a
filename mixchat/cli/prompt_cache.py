"""The file of `--prompt-cache`: looked at before the model is loaded, read and written later."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mixchat import interrupts
from mixchat.cli.output.failure import note
from mixchat.cli.output.show_progress import status
from mixchat.errors import CheckpointError, MixchatError
from mixchat.output_file import OutputFile
from mixchat.sanitize import sanitize

if TYPE_CHECKING:
    from mixchat.engine.generate import Engine
    from mixchat.engine.prompt_cache import PromptCache

# How such a file begins, behind the length of its header: what `engine/prompt_cache.py` writes.
BEGINNING = b'{"__metadata__":{"format":"pt"},"mixchat_prompt_cache":'
_LENGTH_BEGINS = b"\xf8"  # for it is 8 less than a multiple of 4096


def checked_place(path: Path | None) -> Path | None:
    """The file that the path means, if a prompt cache can be kept there. Raises `UsageError`."""
    return None if path is None else _output(path).check().place


def _output(path: Path) -> OutputFile:
    return OutputFile("--prompt-cache", path, _is_ours, streams=False)


def _is_ours(head: bytes) -> bool:
    """Return whether a file is, or before some damage was, a prompt cache, by its beginning."""
    return head[:1] == _LENGTH_BEGINS and BEGINNING.startswith(head[8 : 8 + len(BEGINNING)])


@contextmanager
def keeping(path: Path | None, engine: Engine) -> Iterator[None]:
    """Let the engine go on from what the file has, and keep there what it holds at the end.

    Raises `MixchatError` where that cannot be written, unless something else went wrong before.
    """
    if path is None:
        yield
        return
    loaded = load_cache(path, engine)
    try:
        yield
    except BaseException:
        try:
            _save_checked(path, engine, loaded)
        except MixchatError as error:
            note(str(error))
        raise
    _save_checked(path, engine, loaded)


def _save_checked(path: Path, engine: Engine, loaded: PromptCache | None) -> None:
    """Write the file; not where somebody has put another one there since the first look."""
    _output(path).check()
    save_cache(path, engine, loaded)


def load_cache(path: Path, engine: Engine) -> PromptCache | None:
    """Let the engine hold what the file has in place of what it held, if there is a file."""
    if not has_content(path):
        return None
    from mixchat.engine.prompt_cache import PromptCache

    kept = PromptCache(path, engine)
    try:
        with status(sanitize(f"reading {path}")):
            kept.load()
    except CheckpointError as error:
        note(f"{error}; it is written anew")
    return kept


def has_content(path: Path) -> bool:
    """Return whether there is a file of ours that is not empty: no link, device or pipe."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size > 0


def save_cache(path: Path, engine: Engine, loaded: PromptCache | None = None) -> None:
    """Write the file, unless it was `loaded` and nothing is new. Raises `MixchatError`."""
    from mixchat.engine.prompt_cache import PromptCache

    with interrupts.saving(), status(sanitize(f"writing {path}")):
        (loaded or PromptCache(path, engine)).save()
