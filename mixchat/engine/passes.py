"""Passes through the model: the next tokens of one sequence, or of several at once.

V = vocab_size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mixchat.base import interrupts
from mixchat.base.errors import CheckpointError
from mixchat.base.progress import Note
from mixchat.engine.attention import KVContext
from mixchat.engine.cache_batch import CacheBatch
from mixchat.engine.cached_prefix import CachedPrefix
from mixchat.engine.model import LAST, AfterLayer, Model
from mixchat.experts.holder import ExpertHolder
from mixchat.experts.memory import within_memory


@dataclass(frozen=True)
class Part:
    """The next tokens of a sequence.

    proposal: tokens that may come behind the ids. Their keys and values are stored, but the cache
    ends before them.
    """

    held: CachedPrefix
    ids: Sequence[int]
    proposal: Sequence[int] = ()


class ForwardPasses:
    """Computes passes, and counts their tokens and seconds.

    `note` is called with messages for a person; `name` is the model's name for one.
    """

    def __init__(self, model: Model, experts: ExpertHolder, note: Note, name: str) -> None:
        self.model, self.experts = model, experts
        self.total_tokens, self.total_seconds = 0, 0.0
        self._note, self._name = note, name

    def compute(
        self,
        parts: Sequence[Part],
        *,
        exact: bool = False,
        after_layer: AfterLayer = lambda layer: None,
    ) -> torch.Tensor:
        """Return the logits [n, V] of the last token of each part.

        With a proposal those of the last id, and of each proposed token, one below the other.
        Ctrl-C is handled between layers that are not in one program, and while an expert is
        loading. An interrupted pass leaves all caches as they were.
        """
        ids = [token for part in parts for token in (*part.ids, *part.proposal)]
        device = self.model.device

        def between_layers(layer: int) -> None:
            interrupts.check()
            after_layer(layer)

        def compute() -> torch.Tensor:
            return self.model.forward(
                torch.tensor(ids),
                _before(parts, device),
                exact=exact,
                logits_of=_wanted(parts),
                after_layer=between_layers,
            )

        start = time.perf_counter()
        with interrupts.deferred(), torch.inference_mode():
            logits = within_memory(self.experts, compute, self._note)
            for part in parts:
                part.held.cache.length -= len(part.proposal)
                part.held.add(part.ids)
            self.total_tokens += len(ids)
            self.total_seconds += time.perf_counter() - start
        return logits

    def checked(self, logits: torch.Tensor) -> torch.Tensor:
        """Return logits [V] in fp32, on the CPU. Raises `CheckpointError` unless all are finite."""
        checked = logits.cpu().float()
        if not math.isfinite(checked.sum().item()):
            raise CheckpointError(
                "the model computes values that are not numbers: its weights are damaged",
                hint=f"Run: mixchat verify {self._name}. It names the damaged file; where it finds "
                "none, the checkpoint itself is damaged.",
            )
        return checked


def _before(parts: Sequence[Part], device: torch.device) -> KVContext:
    if len(parts) == 1:
        return parts[0].held.cache
    caches = [part.held.cache for part in parts]
    return CacheBatch(caches, [len(part.ids) + len(part.proposal) for part in parts], device)


def _wanted(parts: Sequence[Part]) -> slice | list[int]:
    """Return the rows whose logits are wanted, of those of all parts."""
    if len(parts) == 1 and not parts[0].proposal:
        return LAST
    wanted: list[int] = []
    start = 0
    for part in parts:
        end = start + len(part.ids) + len(part.proposal)
        wanted += range(start + len(part.ids) - 1, end)
        start = end
    return wanted
