"""Saves the engine's KV cache in a file, so that the next run processes only what is new.

The file lies where `--prompt-cache` says, or beside a saved chat (`--keep-cache`).
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from mixchat.base import interrupts
from mixchat.base.errors import CheckpointError, MixchatError
from mixchat.base.output_file import OutputFile
from mixchat.base.sanitize import sanitize
from mixchat.cli.output.failure import note, print_error
from mixchat.cli.output.show_progress import status

if TYPE_CHECKING:
    from mixchat.chat.saved.chat_saver import ChatSaver
    from mixchat.chat.session import ChatSession
    from mixchat.engine.prompt_cache import PromptCache

# The start of such a file, behind the length of its header: engine/prompt_cache.py writes it.
FILE_START = b'{"__metadata__":{"format":"pt"},"mixchat_prompt_cache":'
_LENGTH_START = b"\xf8"  # its lowest byte: the length is 8 less than a multiple of 4096


class CachePlace(Protocol):
    """The place of the file. `strict`: raise an error if it cannot be written at the end.

    `per_chat`: each chat of a run has a file of its own.
    """

    @property
    def path(self) -> Path: ...

    @property
    def strict(self) -> bool: ...

    @property
    def per_chat(self) -> bool: ...

    def prepare(self) -> bool:
        """Return whether to write the file now. Raises `UsageError` where it cannot be written."""


@dataclass(frozen=True)
class NamedFile:
    """The file that `--prompt-cache` names, one for all chats of a run."""

    path: Path
    strict = True
    per_chat = False

    @classmethod
    def checked(cls, path: Path) -> NamedFile:
        """Return the file that `path` means, a link followed. Raises `UsageError`.

        This is done before the model is loaded, which takes long.
        """
        return cls(_output(path).check().place)

    def prepare(self) -> bool:
        """Return True. Raises `UsageError` where another file has been put there meanwhile."""
        _output(self.path).check()
        return True


@dataclass(frozen=True)
class FileBesideChat:
    """The file beside a saved chat: created if `create`, else only updated where there is one."""

    saver: ChatSaver
    create: bool
    strict: bool = False
    per_chat = True

    @property
    def path(self) -> Path:
        """Return the place for the chat that is open now."""
        return self.saver.kv_path

    def prepare(self) -> bool:
        """Return whether to write the file; remove it where every turn was undone."""
        if not self.saver.autosave or not (self.create or _has_content(self.path)):
            return False
        if not self.saver.session.history:
            self.path.unlink(missing_ok=True)
            return False
        return True


class CacheSaver:
    """The KV cache of a session's engine: loaded from the file of `place` at first, saved at the
    end.

    At the end it raises `MixchatError` where the place is strict and the file cannot be written,
    unless something else went wrong before; all else is only printed.
    """

    def __init__(self, session: ChatSession, place: CachePlace) -> None:
        self._session, self._place = session, place
        self._loaded: PromptCache | None = None

    def __enter__(self) -> CacheSaver:
        self._load()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None:
            self._save_or_tell(lambda error: note(str(error)))
        elif self._place.strict:
            self._save()
        else:
            self._save_or_tell(print_error)

    def leave_chat(self) -> None:
        """Save the cache of a chat, before another one is started or resumed."""
        if self._place.per_chat:
            self._save_or_tell(print_error)

    def enter_chat(self) -> None:
        """Load the cache of a chat that was resumed."""
        if self._place.per_chat:
            self._load()

    @contextmanager
    def changing_model(self) -> Iterator[None]:
        """Save the cache before the block replaces the engine; load it again where that fails.

        That of the new engine is saved in its place.
        """
        self._save_or_tell(print_error)
        try:
            yield
        except (Exception, KeyboardInterrupt):
            if not self._session.engine.is_closed:
                self._load()
            raise
        self._loaded = None

    def _load(self) -> None:
        self._session.engine.forget()  # what it holds may be of another chat
        self._loaded, path = None, self._place.path
        if not _has_content(path):
            return
        from mixchat.engine.prompt_cache import PromptCache

        self._loaded = PromptCache(path, self._session.engine)
        try:
            with status(sanitize(f"reading {path}")):
                self._loaded.load()
        except CheckpointError as error:
            note(f"{error}; it will be written again")

    def _save_or_tell(self, tell: Callable[[MixchatError], object]) -> None:
        try:
            self._save()
        except MixchatError as error:
            tell(error)

    def _save(self) -> None:
        if not self._place.prepare():
            return
        from mixchat.engine.prompt_cache import PromptCache

        cache, path = self._loaded, self._place.path
        if cache is None or cache.path != path:  # no file yet, or another chat's
            cache = PromptCache(path, self._session.engine)
        with interrupts.saving(), status(sanitize(f"writing {path}")):
            cache.save()


def _output(path: Path) -> OutputFile:
    return OutputFile("--prompt-cache", path, _is_ours, streams=False)


def _is_ours(head: bytes) -> bool:
    """Return whether a file is, or before some damage was, a prompt cache, by its beginning."""
    return head[:1] == _LENGTH_START and FILE_START.startswith(head[8 : 8 + len(FILE_START)])


def _has_content(path: Path) -> bool:
    """Return whether there is a file of ours that is not empty: no link, device or pipe."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size > 0
