"""The tokens of one sequence whose keys and values a KV cache holds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from operator import eq
from typing import TYPE_CHECKING

from mixchat.base import interrupts

if TYPE_CHECKING:
    from mixchat.engine.kv_cache import KVCache


def shared_beginning(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many first tokens two sequences have in common."""
    return sum(1 for _ in takewhile(bool, map(eq, one, other)))


class CachedPrefix:
    """A KV cache, and the ids of the tokens in it."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self._ids: list[int] = []  # may be longer than the cache, after an interruption

    @property
    def ids(self) -> list[int]:
        """Return the ids of the tokens that the cache holds."""
        return self._ids[: self.cache.length]

    def shared_with(self, ids: Sequence[int]) -> int:
        """Return the length of the beginning that the held tokens share with `ids`."""
        return shared_beginning(self.ids, ids)

    def cut(self, length: int) -> None:
        """Hold only the first tokens from now on."""
        with interrupts.deferred():
            del self._ids[length:]
            self.cache.length = length

    def add(self, ids: Sequence[int]) -> None:
        """Note the ids of the tokens that the cache has got behind its others."""
        self._ids += ids

    def resume(self, ids: Sequence[int]) -> None:
        """Continue from these tokens, whose keys and values have been put into the cache."""
        self._ids = list(ids)
        self.cache.length = len(ids)

    def copy_from(self, other: CachedPrefix, length: int) -> None:
        """Hold the first tokens of another sequence, and nothing else."""
        self.clear()
        for layer in range(self.cache.config.num_hidden_layers):
            self.cache.restore(layer, other.cache.content(layer, length), length)
        self.resume(other.ids[:length])

    def clear(self) -> None:
        """Hold nothing, and give the memory back."""
        self._ids = []
        self.cache.clear()
