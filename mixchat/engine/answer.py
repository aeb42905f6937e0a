"""An answer in token ids, from its request to its end. This file imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from typing import TYPE_CHECKING, Literal

from mixchat.base.options import SamplingOptions
from mixchat.engine.stats import GenerationStats

if TYPE_CHECKING:
    import torch

    from mixchat.engine.passes import CachedPrefix
    from mixchat.engine.sampling import Constraint, Sampler
    from mixchat.engine.speculation import Proposals

EndReason = Literal["stop", "length", "context"]
OnPrefill = Callable[[int, int], object]  # is called with the tokens done, and their total


class TokenAnswer:
    """An answer that waits, is computed, or has ended. `ids` are its prompt's tokens and its own.

    max_tokens: the limit, within the context. at_max: the reason to end an answer at this limit.
    on_prefill: called after layers of the prompt.

    Any thread may call `cancel`. `error` is why the answer failed. A batch that computes it gives
    it `sampler`, `proposals` and `prefix`, and takes them back when the answer leaves.
    """

    sampler: Sampler
    proposals: Proposals

    def __init__(
        self,
        ids: Sequence[int],
        sampling: SamplingOptions,
        stop_ids: Set[int],
        max_tokens: int,
        constraint: Constraint | None = None,
        on_prefill: OnPrefill = lambda done, total: None,
        at_max: Literal["length", "context"] = "length",
    ) -> None:
        self.ids = list(ids)
        self.sampling = sampling
        self.stop_ids = stop_ids
        self.max_tokens = max_tokens
        self.at_max = at_max
        self.constraint = constraint
        self._on_prefill = on_prefill
        self.stats = GenerationStats(len(self.ids))
        self.prefix: CachedPrefix | None = None
        self.logits: torch.Tensor | None = None  # [vocab_size], of the last token
        self.error: Exception | None = None
        self.is_cancelled = False
        self.tokens_read = 0  # tokens of the prompt that were computed, out of `tokens_to_read`

    @property
    def generated_tokens(self) -> int:
        return self.stats.generated_tokens

    @property
    def tokens_to_read(self) -> int:
        """Return how many tokens of the prompt were not cached."""
        return self.stats.prompt_tokens - self.stats.reused_tokens

    @property
    def end(self) -> EndReason | None:
        """Return why the last token ends the answer, None if it does not."""
        if not self.generated_tokens:
            return None
        if self.ids[-1] in self.stop_ids:
            return "stop"
        return self.at_max if self.generated_tokens >= self.max_tokens else None

    @property
    def has_ended(self) -> bool:
        """Return whether no token will follow."""
        return self.is_cancelled or self.error is not None or self.end is not None

    def cancel(self) -> None:
        self.is_cancelled = True

    def note_read(self, tokens: int) -> None:
        """Take the progress of a pass, in tokens of the prompt that were not cached."""
        self._on_prefill(tokens, self.tokens_to_read)
