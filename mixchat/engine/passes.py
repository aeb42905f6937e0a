"""Passes through the model, for the next tokens of one sequence or of several at once.

T = tokens of the pass, V = vocab_size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, takewhile
from operator import eq
from typing import Any

import numpy as np
import torch

from mixchat.base import gpu, interrupts
from mixchat.base.context import Context
from mixchat.base.errors import CheckpointError, PromptError
from mixchat.base.progress import Note
from mixchat.engine.caches.layer_cache import LayerCache
from mixchat.engine.caches.sequence_cache import SequenceCache
from mixchat.engine.chunk_sizer import SMALLEST_CHUNK
from mixchat.engine.model import LAST, AfterLayer, Transformer
from mixchat.experts.holder import ExpertHolder
from mixchat.experts.memory import within_memory
from mixchat.kernels.cpu.threads import one_thread


def shared_beginning(ids: Sequence[int], prompt: Sequence[int]) -> int:
    """Return how many first tokens two sequences have in common."""
    return sum(1 for _ in takewhile(bool, map(eq, ids, prompt)))


class CachedPrefix:
    """The caches of a sequence, and the ids of the tokens in them."""

    def __init__(self, cache: SequenceCache) -> None:
        self.cache = cache
        # Longer than the cache after an interruption, so `ids` cuts it.
        self._ids: list[int] = []

    @property
    def ids(self) -> list[int]:
        return self._ids[: self.cache.length]

    @property
    def context(self) -> Context:
        return Context(self.cache.capacity, self.cache.config.largest_context)

    def longest_answer(self, ids: Sequence[int], max_tokens: int | None) -> int:
        """Return how many tokens the answer to a prompt may have.

        Raises `PromptError` if the prompt is empty or too long, and `CheckpointError` if it has
        tokens that the model does not know.
        """
        known = self.cache.config.vocab_size
        if not ids:
            raise PromptError("the prompt is empty")
        if max(ids) >= known:
            raise CheckpointError(
                f"the tokenizer is not this model's: it gives the token {max(ids)}, "
                f"the model has {known}"
            )
        room = self.cache.capacity - len(ids)
        if room <= 0:
            raise self.context.prompt_too_long(len(ids))
        return room if max_tokens is None else min(max_tokens, room)

    def shared_with(self, ids: Sequence[int]) -> int:
        """Return how many first tokens of a prompt the cache can be cut to."""
        return self.cache.usable(shared_beginning(self.ids, ids))

    def cut(self, length: int) -> None:
        with interrupts.deferred():
            del self._ids[length:]
            self.cache.cut(length)

    def add(self, ids: Sequence[int]) -> None:
        """Note tokens that have joined the cache."""
        self._ids += ids

    def resume(self, ids: Sequence[int]) -> None:
        """Continue from these tokens, which have been put into the cache."""
        assert self.cache.length == len(ids)
        self._ids = list(ids)

    def copy_from(self, source: CachedPrefix, length: int) -> None:
        self.clear()
        self.cache.copy_from(source.cache, length)
        self._ids = source.ids[:length]

    def clear(self) -> None:
        """Hold nothing, and give the memory back."""
        self._ids = []
        self.cache.clear()


@dataclass(frozen=True)
class SequenceTokens:
    """The next tokens of a sequence in a pass.

    proposal: tokens that may follow the ids. The cache ends before them.
    """

    prefix: CachedPrefix
    ids: Sequence[int]
    proposal: Sequence[int] = ()

    @property
    def all_ids(self) -> list[int]:
        return [*self.ids, *self.proposal]


class PassTooLargeError(Exception):
    """A GPU's memory ran out. It may suffice for fewer tokens of a prompt."""


class ForwardPasses:
    """Computes passes, and counts their tokens and seconds.

    note: is called with messages for a person.
    """

    def __init__(self, model: Transformer, experts: ExpertHolder, note: Note, name: str) -> None:
        self.model = model
        self.experts = experts
        self.total_tokens = 0
        self.total_seconds = 0.0
        self._note = note
        self._name = name

    def compute(
        self,
        chunks: Sequence[SequenceTokens],
        *,
        exact: bool = False,
        after_layer: AfterLayer = lambda layer: None,
    ) -> torch.Tensor:
        """Return the logits [n, V] of the last token of each chunk, and of each proposed token.

        Ctrl-C is handled between layers that are not in one program, and while an expert is
        loading. An interrupted pass leaves all caches as they were. Raises `PassTooLargeError` if a
        GPU lacks the memory for so many tokens.
        """
        ids = [token for chunk in chunks for token in chunk.all_ids]

        def between_layers(layer: int) -> None:
            interrupts.check()
            after_layer(layer)

        def compute() -> torch.Tensor:
            cache = chunks[0].prefix.cache
            return self.model.forward(
                torch.from_numpy(np.array(ids)),
                # A lone cache itself, since the decoder of single tokens takes no other context.
                cache if len(chunks) == 1 else _SequencesContext(chunks),
                exact=exact,
                logits_of=_logit_rows(chunks),
                after_layer=between_layers,
            )

        def compute_or_shrink() -> torch.Tensor:
            try:
                return compute()
            except torch.OutOfMemoryError:
                gpu.release_unused(self.model.device)
                if max(len(chunk.ids) for chunk in chunks) > SMALLEST_CHUNK:
                    raise PassTooLargeError from None
                raise

        start = time.perf_counter()
        with interrupts.deferred(), torch.inference_mode():
            logits = within_memory(self.experts, compute_or_shrink, self._note)
            for chunk in chunks:
                # Proposed tokens join the cache as they are accepted, one after the other.
                if chunk.proposal:
                    chunk.prefix.cache.cut(chunk.prefix.cache.length - len(chunk.proposal))
                chunk.prefix.add(chunk.ids)
            self.total_tokens += len(ids)
            self.total_seconds += time.perf_counter() - start
        return logits

    @one_thread()
    def checked(self, logits: torch.Tensor) -> torch.Tensor:
        """Return logits [V] in fp32, on the CPU. Raises `CheckpointError` unless all are finite."""
        checked = logits.cpu().float()
        # One number that is not finite makes the sum so. For 32,000 logits the sum takes 3 us,
        # and `isfinite` 70.
        if not math.isfinite(checked.sum().item()):
            raise CheckpointError(
                "the model computes values that are not numbers: its weights are damaged",
                hint=f"Run: mixchat verify {self._name}. It names the damaged file. If it finds "
                "none, the checkpoint itself is damaged.",
            )
        return checked


class _SequencesContext:
    """The caches of several sequences as one `TokenContext`.

    With 5 and 7 tokens in the caches, and 1 and 2 new ones, the positions are 5, 7, 8.
    """

    def __init__(self, chunks: Sequence[SequenceTokens]) -> None:
        self.programs: dict[Hashable, Any] = {}
        self.caches = [chunk.prefix.cache for chunk in chunks]
        self._counts = [len(chunk.all_ids) for chunk in chunks]
        ends = accumulate(self._counts, initial=0)
        self._rows = [slice(start, end) for start, end in pairwise(ends)]
        positions = [
            torch.arange(cache.length, cache.length + count)
            for cache, count in zip(self.caches, self._counts, strict=True)
        ]
        self._positions = torch.cat(positions)

    def positions(self, tokens: int) -> torch.Tensor:
        assert tokens == self._positions.shape[0]
        return self._positions

    def pieces(self, layer: int) -> Sequence[tuple[slice, LayerCache]]:
        caches = (cache.layers[layer] for cache in self.caches)
        return list(zip(self._rows, caches, strict=True))

    def advance(self, tokens: int) -> None:
        for cache, count in zip(self.caches, self._counts, strict=True):
            cache.advance(count)


def _logit_rows(chunks: Sequence[SequenceTokens]) -> slice | list[int]:
    """Return the rows of a pass that need logits: each chunk's last token, and its proposal."""
    if len(chunks) == 1 and not chunks[0].proposal:
        return LAST  # a view, while a list of rows would be copied
    rows: list[int] = []
    start = 0
    for chunk in chunks:
        end = start + len(chunk.all_ids)
        rows += range(start + len(chunk.ids) - 1, end)
        start = end
    return rows
