"""The file of `--prompt-cache`: looked at before the model is loaded, read and written later."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mixchat.chat.sanitize import sanitize
from mixchat.cli.progress import status
from mixchat.cli.report import note
from mixchat.errors import CheckpointError, MixchatError, UsageError

if TYPE_CHECKING:
    from mixchat.engine.generate import Engine
    from mixchat.engine.prompt_cache import PromptCache

# How such a file begins, behind the length of its header: what `engine/prompt_cache.py` writes.
BEGINNING = b'{"__metadata__":{"format":"pt"},"mixchat_prompt_cache":'
_LENGTH_BEGINS = b"\xf8"  # for it is 8 less than a multiple of 4096


def checked_place(path: Path | None) -> Path | None:
    """The path, if a prompt cache can be kept there. Raises `UsageError`.

    Nothing else is replaced: a file that never was a prompt cache is somebody's own.
    """
    if path is None:
        return None
    try:
        place = path.resolve()
        if not place.parent.is_dir():
            raise UsageError(f"--prompt-cache {path}: there is no directory {place.parent}")
        if not os.access(place.parent, os.W_OK | os.X_OK):
            raise UsageError(f"--prompt-cache {path}: {place.parent} cannot be written to")
        if place.exists() and not _is_ours(place):
            raise UsageError(
                f"--prompt-cache {path}: this is something else, which is left as it is",
                hint="Give a file that is not there yet, or one that --prompt-cache wrote.",
            )
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"--prompt-cache {path}: cannot be read ({reason})") from None
    return path


def _is_ours(path: Path) -> bool:
    """Whether it is a prompt cache, or was one before it was damaged; or an empty file."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        first = file.read(8 + len(BEGINNING))
    return first[:1] in (b"", _LENGTH_BEGINS) and BEGINNING.startswith(first[8:])


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
            save_cache(path, engine, loaded)
        except MixchatError as error:
            note(str(error))
        raise
    save_cache(path, engine, loaded)


def load_cache(path: Path, engine: Engine) -> PromptCache | None:
    """Let the engine hold what the file has in place of what it held, if there is a file."""
    if not path.exists() or not path.stat().st_size:
        return None
    from mixchat.engine.prompt_cache import PromptCache

    kept = PromptCache(path, engine)
    try:
        with status(sanitize(f"reading {path}")):
            kept.load()
    except CheckpointError as error:
        note(f"{error}; it is written anew")
    return kept


def save_cache(path: Path, engine: Engine, loaded: PromptCache | None = None) -> None:
    """Write the file, unless it was `loaded` and nothing is new. Raises `MixchatError`."""
    from mixchat.engine.prompt_cache import PromptCache

    with status(sanitize(f"writing {path}")):
        (loaded or PromptCache(path, engine)).save()
