"""From token ids to token ids: prefill the prompt, then decode one token at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mixchat import interrupts
from mixchat.context import Context
from mixchat.engine.kv_cache import KVCache
from mixchat.engine.model import Model
from mixchat.engine.sampling import Sampler
from mixchat.errors import CheckpointError, PromptError, ResourceError
from mixchat.experts.fetcher import Fetcher
from mixchat.experts.keys import ExpertKey
from mixchat.experts.stats import ExpertReport
from mixchat.options import SamplingOptions

if TYPE_CHECKING:
    from mixchat.planning.expectation import SpeedRange

# Tokens. Where experts come from disk each chunk reads most of them anew: few, large chunks.
PREFILL_CHUNK = 2048

Reading = Callable[[int, int], object]


@dataclass
class GenerationStats:
    """What one call of `Engine.generate` did: counts of tokens, and seconds."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


class Engine:
    """A model with its KV cache, which is kept from call to call.

    A prompt that begins as the last one did (a chat that goes on) is prefilled only from where the
    two part. `stats` describes the last call, `experts.stats` counts from the start. `expected`
    says how many tokens a second this machine should decode, where that is known; `note` gets what
    a person should hear of, and `reading`, which may be replaced, how many tokens of a prompt have
    been read, and of how many. `identity` differs where the weights do. With
    `exact_prompts` the tokens of a prompt are computed to the bit as decoded ones are, in chunks of
    any size. `name` is what a person calls the model.
    """

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        experts: Fetcher,
        *,
        prefill_chunk: int = PREFILL_CHUNK,
        expected: Callable[[], SpeedRange | None] = lambda: None,
        note: Callable[[str], object] = lambda text: None,
        identity: str = "",
        exact_prompts: bool = False,
        name: str = "MODEL",
    ) -> None:
        self.config, self.identity, self.exact_prompts = model.config, identity, exact_prompts
        self.experts, self.expected = experts, expected
        self.stats, self._name = GenerationStats(), name
        self.reading: Reading = lambda done, of: None
        self._tokens, self._seconds = 0, 0.0  # of all calls
        self._model, self._cache, self._chunk, self._note = model, cache, prefill_chunk, note
        self._ids: list[int] = []  # the tokens whose keys and values the cache holds

    @property
    def context_size(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self._cache.capacity

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self._model.device

    def pretend(self, tokens: int) -> None:
        """Hold so many tokens, each the token 0, with keys and values made up: to measure what
        comes behind them without the minutes that computing them takes."""
        self._ids, self._cache.length = [], 0
        config = self.config
        heads = config.num_key_value_heads
        shape = (min(tokens, self._chunk), 2 * heads, config.head_dim)
        while tokens:
            made_up = torch.randn(shape).to(self._model.dtype)[:tokens].to(self.device)
            for layer in range(config.num_hidden_layers):
                self._cache.store(layer, made_up[:, :heads], made_up[:, heads:])
            self._cache.length += len(made_up)
            tokens -= len(made_up)
        self._ids = [0] * self._cache.length

    def held(self) -> tuple[list[int], KVCache]:
        """The tokens whose keys and values the cache holds, from its start, and the cache."""
        return self._ids[: self._cache.length], self._cache

    def forget(self) -> None:
        """Hold nothing, as a new engine does."""
        self._ids = []
        self._cache.clear()

    def resume(self, ids: Sequence[int]) -> None:
        """Go on from these tokens, whose keys and values have been restored to the cache."""
        self._ids = list(ids)
        self._cache.length = len(ids)

    def expert_report(self, model: str) -> ExpertReport:
        """What has become of the experts since the start; `model` is the name to put on it."""
        layers = range(self.config.num_hidden_layers)
        keys = [[ExpertKey(n, e) for e in range(self.config.num_local_experts)] for n in layers]
        stats = self.experts.stats
        return ExpertReport(
            model=model,
            hits=[[stats.hits[key] for key in layer] for layer in keys],
            misses=[[stats.misses[key] for key in layer] for layer in keys],
            tiers=[[self.experts.tier(key) for key in layer] for layer in keys],
            slots=self.experts.slots_by_tier,
            bytes_moved=stats.bytes_moved,
            stalled_seconds=stats.stalled_seconds,
            guesses=stats.guesses,
            right_guesses=stats.right_guesses,
            tokens=self._tokens,
            seconds=self._seconds,
        )

    def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        sampling: SamplingOptions,
        stop_ids: Set[int],
        max_tokens: int | None = None,
    ) -> Iterator[int]:
        """Yield the answer's tokens as they are decided.

        Ends with the first token of `stop_ids`, which is yielded too, after `max_tokens`, or when
        the context is full. The iterator may be dropped at any point. Raises `PromptError` at once
        where the prompt is empty or leaves no room for an answer, `CheckpointError` where it has
        tokens that the model does not know; later that, too, where damaged weights give logits that
        are no numbers.
        """
        ids = list(prompt_ids)
        if not ids:
            raise PromptError("the prompt is empty")
        if max(ids) >= self.config.vocab_size:
            raise CheckpointError(
                f"the tokenizer is not this model's: it gives the token {max(ids)}, "
                f"the model has {self.config.vocab_size}"
            )
        if len(ids) >= self.context_size:
            largest = self.config.max_position_embeddings
            raise Context(self.context_size, largest).prompt_too_long(len(ids))
        room = self.context_size - len(ids)
        limit = room if max_tokens is None else min(max_tokens, room)
        return self._generate(ids, Sampler(sampling, stop_ids), stop_ids, limit)

    def _generate(
        self, ids: list[int], sampler: Sampler, stop_ids: Set[int], limit: int
    ) -> Iterator[int]:
        start = time.perf_counter()
        reused = self._rewind(ids)
        self.stats = stats = GenerationStats(prompt_tokens=len(ids), reused_tokens=reused)
        logits = self._prefill(ids[reused:])
        stats.prefill_seconds = time.perf_counter() - start
        while True:
            token = sampler.sample(self._checked(logits[0]), ids)
            ids.append(token)
            stats.generated_tokens += 1
            yield token
            if token in stop_ids or stats.generated_tokens >= limit:
                return
            start = time.perf_counter()
            logits = self._forward([token])
            stats.decode_seconds += time.perf_counter() - start

    def _checked(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits [V] in fp32 on the CPU. Raises `CheckpointError` where one is no number."""
        checked = logits.float().cpu()
        if not math.isfinite(checked.sum().item()):
            raise CheckpointError(
                "the model computes values that are not numbers: its weights are damaged",
                hint=f"Run: mixchat verify {self._name}. It names the damaged file; where it finds "
                "none, the checkpoint itself is damaged.",
            )
        return checked

    def _rewind(self, ids: list[int]) -> int:
        """Cut the cache back to what it shares with `ids`; the length that is left.

        At least one token has to be computed, since its logits are not kept.
        """
        shared = 0
        for old, new in zip(self._ids, ids[:-1], strict=False):
            if old != new:
                break
            shared += 1
        with interrupts.deferred():
            del self._ids[shared:]
            self._cache.length = shared
        return shared

    def _prefill(self, ids: list[int]) -> torch.Tensor:
        for start in range(0, len(ids), self._chunk):
            chunk = ids[start : start + self._chunk]
            logits = self._forward(chunk, self._told(start, len(chunk), len(ids)))
        return logits

    def _told(self, before: int, tokens: int, of: int) -> Callable[[int], object]:
        """Tells `reading` after each layer how far a prompt is read: in tokens, as if all of them
        were read one after the other."""
        layers = self.config.num_hidden_layers
        return lambda layer: self.reading(before + tokens * (layer + 1) // layers, of)

    def _forward(
        self, ids: list[int], after_layer: Callable[[int], object] = lambda layer: None
    ) -> torch.Tensor:
        """The logits. Ctrl-C is heard between two layers, and while an expert is on its way."""

        def between_layers(layer: int) -> None:
            interrupts.check()
            after_layer(layer)

        start = time.perf_counter()
        with interrupts.deferred(), torch.inference_mode():
            device_ids = torch.tensor(ids, device=self._model.device)
            logits = self._within_memory(device_ids, between_layers)
            self._ids += ids
            self._tokens += len(ids)
            self._seconds += time.perf_counter() - start
        return logits

    def _within_memory(
        self, ids: torch.Tensor, after_layer: Callable[[int], object]
    ) -> torch.Tensor:
        """The logits. Where a GPU's memory runs out, it holds fewer experts from then on."""
        while True:
            try:
                return self._model.forward(ids, self._cache, after_layer=after_layer)
            except torch.OutOfMemoryError:
                if not self.experts.halve():
                    raise ResourceError(
                        "the device ran out of memory, with two experts in it",
                        hint="A smaller --ctx-size needs less; --device cpu takes the RAM instead.",
                    ) from None
                self._note(
                    f"the device ran out of memory: it holds {self.experts.slots} experts now"
                )
