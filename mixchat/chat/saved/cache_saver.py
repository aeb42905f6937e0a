"""Saves the KV cache of a chat in a file, for the next run."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, cast

from mixchat.base import interrupts
from mixchat.base.errors import CheckpointError, MixchatError
from mixchat.base.output_file import OutputFile
from mixchat.base.progress import Reporter
from mixchat.base.sanitize import sanitize

if TYPE_CHECKING:
    from mixchat.chat.saved.chat_saver import ChatSaver
    from mixchat.engine.prompt_cache import PromptCache
    from mixchat.face.model import Model

# The start of such a file after 8 bytes with its header's length (engine/prompt_cache.py).
FILE_START = b'{"__metadata__":{"format":"pt"},"mixchat_prompt_cache":'
_LENGTH_START = b"\xf8"  # the lowest byte of a length that is 8 less than a multiple of 4096


def checked_cache_file(path: Path) -> Path:
    """Return the file that --prompt-cache means, a link followed. Raises `UsageError`."""
    return _output(path).check().place


class CacheSaver:
    """The KV cache of a chat's engine, loaded from a file at first and saved at the end.

    `named` is the file of --prompt-cache, for all chats of a run. Otherwise each saved chat has its
    own, which is made only with `create`. If a person asked for the file by either, and it cannot
    be written, `MixchatError` is raised at the end.
    """

    def __init__(
        self,
        saver: ChatSaver,
        reporter: Reporter,
        *,
        named: Path | None = None,
        create: bool = False,
    ) -> None:
        self._saver = saver
        self._reporter = reporter
        self._named = named
        self._create = create
        self._loaded: PromptCache | None = None

    def __enter__(self) -> CacheSaver:
        self._load()
        return self

    def __exit__(self, error_type: type[BaseException] | None, *error: object) -> None:
        if error_type is not None:
            self._save_or_tell(lambda error: self._reporter.note(str(error)))
        elif self._named is not None or self._create:
            self._save()
        else:
            self._save_or_tell(self._reporter.error)

    def leave_chat(self) -> None:
        if self._named is None:
            self._save_or_tell(self._reporter.error)

    def enter_chat(self) -> None:
        if self._named is None:
            self._load()

    @contextmanager
    def changing_model(self) -> Iterator[None]:
        """Save the cache before the block replaces the engine, and load it again if that fails."""
        self._save_or_tell(self._reporter.error)
        try:
            yield
        except (Exception, KeyboardInterrupt):
            self._load()
            raise
        self._loaded = None

    @property
    def _path(self) -> Path:
        return self._named or self._saver.kv_path

    @property
    def _has_engine(self) -> bool:
        """Return whether there is a KV cache. A server keeps its own."""
        engine = self._saver.session.model.engine
        return engine is not None and not engine.is_closed

    @property
    def _model(self) -> Model:
        return cast("Model", self._saver.session.model)

    def _load(self) -> None:
        path = self._path
        self._loaded = None
        if not self._has_engine:
            return
        # Only the model's own thread works with the engine.
        self._model.do(lambda engine: engine.forget())  # what it holds may be of another chat
        if not _has_content(path):
            return
        from mixchat.engine.prompt_cache import PromptCache

        self._loaded = cache = PromptCache(path, self._model.engine)
        try:
            with self._reporter.status(sanitize(f"reading {path}")):
                self._model.do(lambda engine: cache.load())
        except CheckpointError as error:
            self._reporter.note(f"{error}; it will be written again")

    def _save_or_tell(self, tell: Callable[[MixchatError], object]) -> None:
        try:
            self._save()
        except MixchatError as error:
            tell(error)

    def _save(self) -> None:
        session = self._saver.session
        path = self._path
        if not self._has_engine:
            return
        if self._named is not None:
            _output(self._named).check()
        elif not self._saver.autosave or not (self._create or _has_content(path)):
            return
        elif not session.history:  # every turn was undone
            path.unlink(missing_ok=True)
            return
        from mixchat.engine.prompt_cache import PromptCache

        cache = self._loaded
        if cache is None or cache.path != path:  # no file yet, or another chat's
            cache = PromptCache(path, self._model.engine)
        with interrupts.saving(), self._reporter.status(sanitize(f"writing {path}")):
            self._model.do(lambda engine: cache.save())


def _output(path: Path) -> OutputFile:
    return OutputFile("--prompt-cache", path, _is_ours, streams=False)


def _is_ours(head: bytes) -> bool:
    return head[:1] == _LENGTH_START and FILE_START.startswith(head[8 : 8 + len(FILE_START)])


def _has_content(path: Path) -> bool:
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size > 0
