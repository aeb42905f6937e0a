"""Keeps the KV caches of a model in files while it is not loaded."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import TYPE_CHECKING

from mixchat.base.errors import MixchatError
from mixchat.base.files import TEMPORARY_SUFFIX, write_error
from mixchat.base.progress import Note
from mixchat.base.settings import server_caches_dir

if TYPE_CHECKING:
    from mixchat.engine.generate import Engine
    from mixchat.engine.prompt_cache import PromptCache

_CACHE_NAME = re.compile(r"[0-9]+\.kv")


class KeptCaches:
    """A file for each KV cache of a model's engine, which only this person can read.

    `key` is the name of the model's directory. A file that cannot be used or written is told to
    `note`, and costs a prompt's computation.
    """

    def __init__(self, key: str, note: Note) -> None:
        self._directory = server_caches_dir(key)
        self._note = note
        self._caches: list[PromptCache] = []

    def load(self, engine: Engine) -> None:
        from mixchat.engine.prompt_cache import PromptCache

        self._caches = [
            PromptCache(self._directory / f"{number}.kv", engine, number)
            for number in range(len(engine.sequences))
        ]
        for cache in self._caches:
            try:
                with suppress(FileNotFoundError, NotADirectoryError):
                    cache.path.lstat()
                    cache.load()
            except MixchatError as error:
                self._note(f"{error}; it will be written again")
            except OSError as error:
                self._note(f"KV caches cannot be read: {cache.path} ({error.strerror})")
                return  # the next one lies in the same directory

    def save(self, engine: Engine) -> None:
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            self._note(str(write_error(error, self._directory, "KV caches cannot be saved")))
            return
        for cache in self._caches:
            try:
                cache.save()
            except MixchatError as error:
                self._note(str(error))
                return  # the disk is full, so the next one would fail, too


def remove_server_caches(key: str) -> None:
    """Remove the files of `KeptCaches`, if possible. Other files in their directory stay."""
    directory = server_caches_dir(key)
    with suppress(OSError):
        for path in directory.iterdir():
            if _CACHE_NAME.fullmatch(path.name) or path.name.endswith(TEMPORARY_SUFFIX):
                path.unlink()
        directory.rmdir()
