"""From token ids to token ids: prefill the prompt, then decode one token at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import replace

import torch

from mixchat.base import gpu, interrupts, machine
from mixchat.base.errors import CheckpointError, PromptError
from mixchat.base.model_config import Context
from mixchat.base.options import SamplingOptions
from mixchat.base.progress import Note
from mixchat.engine.cached_prefix import CachedPrefix
from mixchat.engine.kv_cache import KVCache
from mixchat.engine.model import Model
from mixchat.engine.passes import ForwardPasses, Part
from mixchat.engine.sampling import Constraint, Sampler
from mixchat.engine.speculation import Proposals, Speculation
from mixchat.engine.stats import GenerationStats
from mixchat.experts.cache import ExpertStats
from mixchat.experts.holder import ExpertHolder
from mixchat.weights.format.blueprint import Blueprint

# Tokens. Where experts come from disk, each chunk reads most of them again: few, large chunks.
PREFILL_CHUNK = 2048

OnPrefill = Callable[[int, int], object]  # is called with the tokens done, and their total


class Engine:
    """A model with its KV caches, which stay filled from call to call.

    A prompt that begins like the last one (a chat that continues) is prefilled only from where the
    two differ. `sequences` has one for each cache, for a `Batch`; `generate` uses the first.
    `note` is called with messages for a person. `identity` differs where the weights do;
    `blueprint` is the form in which they are computed. With `exact_prompts` the tokens of a prompt
    have the same bits as decoded ones, in chunks of any size. With `speculation` several tokens are
    verified in one pass, which has to be exact on this device (see `Model.forward`): answers are
    the same without it. `name` is the model's name for a person.
    """

    def __init__(
        self,
        model: Model,
        caches: Sequence[KVCache],
        experts: ExpertHolder,
        blueprint: Blueprint,
        *,
        prefill_chunk: int = PREFILL_CHUNK,
        note: Note = lambda text: None,
        identity: str = "",
        exact_prompts: bool = False,
        speculation: Speculation | None = None,
        name: str = "MODEL",
    ) -> None:
        self.config, self.identity, self.exact_prompts = model.config, identity, exact_prompts
        self.experts, self.blueprint = experts, blueprint
        self.passes = ForwardPasses(model, experts, note, name)
        self.sequences = [CachedPrefix(cache) for cache in caches]
        self.speculation = speculation
        self._stats, self._experts_before = GenerationStats(), ExpertStats()
        self._held, self._chunk = self.sequences[0], prefill_chunk
        self.is_closed = False

    @property
    def context_size(self) -> int:
        """Return how many tokens prompt and answer may have together."""
        return self._held.cache.capacity

    @property
    def context(self) -> Context:
        """Return the size of the context, and the largest one of this model."""
        return Context(self.context_size, self.config.max_position_embeddings)

    @property
    def device(self) -> torch.device:
        """Return the device on which the model computes."""
        return self.passes.model.device

    @property
    def slots_by_tier(self) -> dict[str, int]:
        """Return how many experts may be held in each tier but the disk, the fastest one first."""
        return self.experts.slots_by_tier

    @property
    def expert_bytes(self) -> int:
        """Return the bytes of memory that experts take where they are computed."""
        return self.experts.bytes_held

    @property
    def stats(self) -> GenerationStats:
        """Return the counts of the last call of `generate`, as far as it has come."""
        return replace(self._stats, experts=self.experts.stats.since(self._experts_before))

    def held(self) -> tuple[list[int], KVCache]:
        """Return the tokens whose keys and values the cache holds, and the cache."""
        return self._held.ids, self._held.cache

    def forget(self) -> None:
        """Empty the cache, like that of a new engine."""
        self._held.clear()

    def close(self) -> None:
        """Give all memory back; then it can only be asked what it is, and what it holds: nothing.

        This cannot be left to the end of the object: an error's traceback may keep it alive.
        """
        device, self.is_closed = self.device, True
        for sequence in self.sequences:
            sequence.clear()
        self.experts.close()
        del self.passes, self.experts
        gpu.release_unused(device)
        machine.return_freed_memory()

    def resume(self, ids: Sequence[int]) -> None:
        """Continue from these tokens, whose keys and values have been put into the cache."""
        self._held.resume(ids)

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

        Ends with the first token of `stop_ids`, which is yielded too, after `max_tokens`, or when
        the context is full. The iterator may be dropped at any point. `on_prefill` is called during
        prefill with the tokens of the prompt that are computed, and their total. Raises
        `PromptError` at once where the prompt is empty or leaves no room for an answer,
        `CheckpointError` where it has tokens that the model does not know; later that, too, where
        damaged weights give logits that are NaN or infinite.
        """
        ids = list(prompt_ids)
        limit = self.longest_answer(ids, max_tokens)
        sampler = Sampler(sampling, stop_ids, constraint)
        return self._generate(ids, sampler, stop_ids, limit, on_prefill)

    def longest_answer(self, ids: Sequence[int], max_tokens: int | None) -> int:
        """Return how many tokens the answer to a prompt may have. Raises as `generate` does."""
        if not ids:
            raise PromptError("the prompt is empty")
        if max(ids) >= self.config.vocab_size:
            raise CheckpointError(
                f"the tokenizer is not this model's: it gives the token {max(ids)}, "
                f"the model has {self.config.vocab_size}"
            )
        if len(ids) >= self.context_size:
            raise self.context.prompt_too_long(len(ids))
        room = self.context_size - len(ids)
        return room if max_tokens is None else min(max_tokens, room)

    def _generate(
        self,
        ids: list[int],
        sampler: Sampler,
        stop_ids: Set[int],
        limit: int,
        on_prefill: OnPrefill,
    ) -> Iterator[int]:
        start = time.perf_counter()
        with interrupts.deferred():
            self.experts.begin_turn()
        reused = self._rewind(ids)
        self._stats = stats = GenerationStats(prompt_tokens=len(ids), reused_tokens=reused)
        self._experts_before = self.experts.stats.copy()
        logits = self._prefill(ids[reused:], on_prefill)
        stats.prefill_seconds = time.perf_counter() - start
        proposals = Proposals(self.speculation, stop_ids)
        stats.speculation = proposals.stats
        while True:
            token = sampler.sample(self.passes.checked(logits[0]), ids)
            ids.append(token)
            stats.generated_tokens += 1
            yield token
            if token in stop_ids or stats.generated_tokens >= limit:
                return
            start = time.perf_counter()
            logits = self._decode(ids, proposals, limit - stats.generated_tokens)
            stats.decode_seconds += time.perf_counter() - start

    def _rewind(self, ids: list[int]) -> int:
        """Cut the cache back to the beginning that it shares with `ids`; return the length left.

        At least one token has to be computed, since the cache has no logits.
        """
        shared = self._held.shared_with(ids[:-1])
        self._held.cut(shared)
        return shared

    def _prefill(self, ids: list[int], on_prefill: OnPrefill) -> torch.Tensor:
        """Return the logits of the last token.

        `on_prefill` is called after layers: of 100 tokens, a layer of 32 counts as 3.
        """
        layers = self.config.num_hidden_layers
        for start in range(0, len(ids), self._chunk):
            chunk = ids[start : start + self._chunk]

            def after_layer(layer: int, before: int = start, tokens: int = len(chunk)) -> None:
                on_prefill(before + tokens * (layer + 1) // layers, len(ids))

            part = Part(self._held, chunk)
            logits = self.passes.compute([part], exact=self.exact_prompts, after_layer=after_layer)
        return logits

    def _decode(self, ids: list[int], proposals: Proposals, left: int) -> torch.Tensor:
        """Return the logits [1, V] after the last of `ids`; `left` more tokens may be generated.

        Whenever the answer ends, the cache is as without speculation: a verified token joins it
        here, when the next one is asked for.
        """
        token = ids[-1]
        verified = proposals.take(token)
        if verified is not None:
            with interrupts.deferred():
                self._held.add([token])
                self._held.cache.advance(1)
            return verified
        proposal = proposals.propose(ids, left - 1)
        start = time.perf_counter()
        logits = self.passes.compute([Part(self._held, [token], proposal)], exact=True)
        return proposals.put(proposal, logits, time.perf_counter() - start)
