"""What the answer loop is asked. This file imports no torch, for those who only ask."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mixchat.base.options import SamplingOptions

if TYPE_CHECKING:
    from mixchat.engine.sampling import Constraint

OnPrefill = Callable[[int, int], object]  # is called with the tokens done, and their total


@dataclass(frozen=True)
class AnswerRequest:
    """A prompt and how to answer it.

    max_tokens: None for as many as fit. on_prefill: is called after layers.
    """

    ids: Sequence[int]
    sampling: SamplingOptions
    stop_ids: Set[int]
    max_tokens: int | None = None
    constraint: Constraint | None = None
    on_prefill: OnPrefill = lambda done, total: None
