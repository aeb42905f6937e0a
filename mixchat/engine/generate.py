"""The engine, a loaded model that answers prompts, from token ids to token ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import replace

import torch

from mixchat.base import gpu, machine
from mixchat.base.context import Context
from mixchat.base.options import SamplingOptions
from mixchat.base.progress import Note
from mixchat.engine.answer import OnPrefill, TokenAnswer
from mixchat.engine.batch import Batch
from mixchat.engine.caches.sequence_cache import SequenceCache
from mixchat.engine.chunk_sizer import PREFILL_CHUNK
from mixchat.engine.model import Transformer
from mixchat.engine.passes import CachedPrefix, ForwardPasses
from mixchat.engine.sampling import Constraint
from mixchat.engine.speculation import Speculation
from mixchat.engine.stats import GenerationStats
from mixchat.experts.cache import ExpertStats
from mixchat.experts.holder import ExpertHolder
from mixchat.weights.format.blueprint import Blueprint


class Engine:
    """A model with its caches, which stay filled from call to call.

    A prompt that begins like the last one is prefilled only from the first difference on.
    `new_batch` uses all caches, `generate` the first.

    note: is called with messages for a person. identity: differs if the weights do. blueprint: the
    form in which the weights are computed. exact_prompts: give prompts the bits of decoding.
    speculation: verify several tokens in one pass, which has to be exact on this device.
    context_is_chosen: by a person, and not by free memory. load_seconds: taken to build the engine.
    """

    def __init__(
        self,
        model: Transformer,
        caches: Sequence[SequenceCache],
        experts: ExpertHolder,
        blueprint: Blueprint,
        *,
        prefill_chunk: int = PREFILL_CHUNK,
        note: Note = lambda text: None,
        identity: str = "",
        exact_prompts: bool = False,
        speculation: Speculation | None = None,
        name: str = "MODEL",
        context_is_chosen: bool = True,
        load_seconds: float = 0.0,
    ) -> None:
        self.config = model.config
        self.identity = identity
        self.exact_prompts = exact_prompts
        self.experts = experts
        self.blueprint = blueprint
        self.passes = ForwardPasses(model, experts, note, name)
        self.sequences = [CachedPrefix(cache) for cache in caches]
        self.prefill_chunk = prefill_chunk
        self.speculation = speculation
        self._stats = GenerationStats()
        self._experts_at_start = ExpertStats()
        self._context_is_chosen = context_is_chosen
        self.load_seconds = load_seconds
        self.is_closed = False

    @property
    def context_size(self) -> int:
        """Return how many tokens prompt and answer may have together."""
        return self.context.tokens

    @property
    def context(self) -> Context:
        return replace(self.sequences[0].context, is_chosen=self._context_is_chosen)

    @property
    def device(self) -> torch.device:
        return self.passes.model.device

    @property
    def slots_by_tier(self) -> dict[str, int]:
        """Return how many experts each tier but the disk may hold, the fastest first."""
        return self.experts.slots_by_tier

    @property
    def expert_bytes(self) -> int:
        """Return the bytes of experts on the devices that compute them."""
        return self.experts.bytes_held

    @property
    def stats(self) -> GenerationStats:
        """Return the counts of the last call of `generate` so far."""
        return replace(self._stats, experts=self.experts.stats.since(self._experts_at_start))

    def held(self, number: int = 0) -> tuple[list[int], SequenceCache]:
        """Return the tokens that a cache holds, and the cache."""
        return self.sequences[number].ids, self.sequences[number].cache

    def resume(self, ids: Sequence[int], number: int = 0) -> None:
        """Continue from these tokens, which have been put into the cache."""
        self.sequences[number].resume(ids)

    def forget(self) -> None:
        self.sequences[0].clear()

    def close(self) -> None:
        """Give all memory back. An error's traceback may keep the object alive."""
        device = self.device
        self.is_closed = True
        for sequence in self.sequences:
            sequence.clear()
        self.experts.close()
        del self.passes, self.experts
        gpu.release_unused(device)
        machine.return_freed_memory()

    def longest_answer(self, ids: Sequence[int], max_tokens: int | None) -> int:
        """Return how many tokens an answer may have. Raises as `generate` does."""
        return self.sequences[0].longest_answer(ids, max_tokens)

    def new_batch(self, most: int | None = None, *, shared_prefix: bool = True) -> Batch:
        """Return a batch of all caches, or of the first `most`, for as many answers at once."""
        sequences = self.sequences[:most]
        return Batch(
            self.passes,
            sequences,
            self.speculation,
            exact_prompts=self.exact_prompts,
            # Nobody waits behind the long prompt of a lone answer.
            chunk=self.prefill_chunk if len(sequences) == 1 else None,
            shared_prefix=shared_prefix,
        )

    def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        sampling: SamplingOptions,
        stop_ids: Set[int],
        max_tokens: int | None = None,
        constraint: Constraint | None = None,
        on_prefill: OnPrefill = lambda done, total: None,
    ) -> Iterator[int]:
        """Yield the answer's tokens as they are sampled, each allowed by `constraint`.

        The answer ends with the first token of `stop_ids`, which is yielded too, after
        `max_tokens`, or if the context is full. `on_prefill` is called after layers with the tokens
        of the prompt that are computed, and their total.

        Raises `PromptError` at once if the prompt is empty or too long, and `CheckpointError` if it
        has unknown tokens. The iterator raises that, too, if logits are NaN or infinite.
        """
        most = self.longest_answer(prompt_ids, max_tokens)
        batch = self.new_batch(1)
        answer = TokenAnswer(prompt_ids, sampling, stop_ids, most, constraint, on_prefill)
        batch.add(answer)
        self._stats = answer.stats
        self._experts_at_start = self.experts.stats

        # A generator's own body would raise the errors of `add` only at its first token.
        def tokens() -> Iterator[int]:
            while not answer.has_ended:
                count = answer.generated_tokens
                batch.step()
                if answer.error is not None:
                    try:
                        raise answer.error
                    finally:
                        # Otherwise the traceback and the answer keep each other alive.
                        answer.error = None
                if answer.generated_tokens > count:
                    yield answer.ids[-1]

        return tokens()
