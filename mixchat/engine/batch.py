"""Several answers at once: each pass has the next token of each, and pieces of new prompts.

An expert is read once for all tokens that selected it. Passes are exact: an answer has the same
bits alone as beside others, wherever the kernels can do that (see `Linear`).

V = vocab_size.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mixchat.base.errors import MixchatError
from mixchat.base.options import SamplingOptions
from mixchat.engine.cached_prefix import CachedPrefix, shared_beginning
from mixchat.engine.chunk_sizer import ChunkSizer
from mixchat.engine.generate import PREFILL_CHUNK, Engine
from mixchat.engine.passes import Part
from mixchat.engine.sampling import Constraint, Sampler
from mixchat.engine.speculation import Proposals

# Seconds that a pass may take with tokens of prompts in it, where others decode in it, or not; and
# how many times as long as a pass without them.
_PATIENCE, _PATIENCE_ALONE, _PASSES = 0.7, 8.0, 4
_LEAST_PIECE, _FIRST_PIECE = 16, 32  # tokens
_WORTH_WAITING = 16  # tokens that another prompt of the pass computes
_WORTH_COPYING = 4  # tokens; prompts of a model share their first ones anyway


@dataclass(frozen=True)
class Prompt:
    """A prompt and how to answer it; see `Engine.generate`."""

    ids: Sequence[int]
    sampling: SamplingOptions
    stop_ids: frozenset[int]
    max_tokens: int | None = None
    constraint: Constraint | None = None


class BatchedAnswer:
    """An answer in the making: `ids` are the tokens of the prompt, and those generated so far.

    `cancel` may be called by any thread. `error` is why it failed.
    """

    def __init__(self, prompt: Prompt, limit: int, proposals: Proposals) -> None:
        self.ids = list(prompt.ids)
        self.prompt_tokens, self.reused_tokens = len(prompt.ids), 0
        self.stop_ids = prompt.stop_ids
        self.sampler = Sampler(prompt.sampling, prompt.stop_ids, prompt.constraint)
        self.proposals = proposals
        self.held: CachedPrefix | None = None
        self.logits: torch.Tensor | None = None  # [V] behind the last of `ids`
        self.error: MixchatError | None = None
        self.is_cancelled = False
        self._limit = limit

    @property
    def generated_tokens(self) -> int:
        """Return how many tokens of the answer there are."""
        return len(self.ids) - self.prompt_tokens

    @property
    def tokens_left(self) -> int:
        """Return how many tokens more may be generated."""
        return self._limit - self.generated_tokens

    @property
    def unread(self) -> int:
        """Return how many tokens of the prompt are still to be computed."""
        held = 0 if self.held is None else self.held.cache.length
        return max(self.prompt_tokens - held, 0)

    @property
    def has_ended(self) -> bool:
        """Return whether no token will follow."""
        if self.is_cancelled or self.error is not None or self.tokens_left <= 0:
            return True
        return self.generated_tokens > 0 and self.ids[-1] in self.stop_ids

    def cancel(self) -> None:
        """End the answer, before the next pass at the latest."""
        self.is_cancelled = True


class Batch:
    """The answers that an engine computes now: at most one for each of its caches.

    shared_prefix: whether an answer uses what an earlier prompt began with, too.
    """

    def __init__(self, engine: Engine, *, shared_prefix: bool = True) -> None:
        self._engine, self._passes, self._shares = engine, engine.passes, shared_prefix
        self._free = list(engine.sequences)  # the least recently used first
        self._answers: list[BatchedAnswer] = []
        # By whether others decode in the pass.
        self._pieces_of = {
            False: ChunkSizer(PREFILL_CHUNK, _LEAST_PIECE, PREFILL_CHUNK),
            True: ChunkSizer(_FIRST_PIECE, _LEAST_PIECE, PREFILL_CHUNK),
        }
        self._decoding_seconds = 0.0  # of the last pass without tokens of prompts

    @property
    def most(self) -> int:
        """Return how many answers may be in the making."""
        return len(self._engine.sequences)

    @property
    def has_room(self) -> bool:
        """Return whether `add` may be called."""
        return len(self._answers) < self.most

    @property
    def size(self) -> int:
        """Return how many answers are in the making."""
        return len(self._answers)

    def add(self, prompt: Prompt) -> BatchedAnswer:
        """Begin an answer. Raises as `Engine.generate` does."""
        assert self.has_room
        limit = self._engine.longest_answer(prompt.ids, prompt.max_tokens)
        self._engine.experts.begin_turn()
        proposals = Proposals(self._engine.speculation, prompt.stop_ids)
        answer = BatchedAnswer(prompt, limit, proposals)
        self._answers.append(answer)
        return answer

    def step(self) -> list[BatchedAnswer]:
        """Compute one pass; return the answers with something new: a token, progress, or an end.

        An answer that has ended leaves the batch. A fault is stored in the answers that it hit.
        """
        ended = [answer for answer in self._answers if answer.has_ended]
        computed = self._compute([answer for answer in self._answers if not answer.has_ended])
        for answer in computed:
            self._sample(answer)
        for answer in [*ended, *(answer for answer in computed if answer.has_ended)]:
            self._remove(answer)
        return [*ended, *computed]

    def _compute(self, answers: Sequence[BatchedAnswer]) -> list[BatchedAnswer]:
        """Compute the logits of the next tokens; return the answers that were in the pass."""
        verified = [answer for answer in answers if self._take_verified(answer)]
        if verified:
            return verified
        pieces = self._pieces(answers)
        if not pieces:
            return []
        computed = [answer for answer, _ in pieces]
        try:
            self._pass(pieces)
        except _AllCancelledError:
            pass
        except MixchatError as error:
            for answer in computed:
                answer.error = error
        return computed

    def _take_verified(self, answer: BatchedAnswer) -> bool:
        """Take the logits behind the last token, if they were computed in an earlier pass."""
        if answer.held is None or not answer.generated_tokens:
            return False
        logits = answer.proposals.take(answer.ids[-1])
        if logits is None:
            return False
        answer.held.add(answer.ids[-1:])
        answer.held.cache.advance(1)
        answer.logits = logits[0]
        return True

    def _pieces(self, answers: Sequence[BatchedAnswer]) -> list[tuple[BatchedAnswer, Part]]:
        """Return the next pass: the last token of each answer, and tokens of the first prompts.

        A prompt that begins like one in this pass waits for it, to copy its beginning.
        """
        decoding = [answer for answer in answers if answer.generated_tokens]
        pieces = [
            (answer, self._next_token(answer, alone=len(answers) == 1)) for answer in decoding
        ]
        room = self._room(bool(decoding))
        begun: list[BatchedAnswer] = []
        for answer in answers:
            if answer.generated_tokens or room <= 0:
                continue
            if answer.held is None and not self._begin(answer, begun):
                continue
            assert answer.held is not None
            begun.append(answer)
            start = answer.held.cache.length
            ids = answer.ids[start : start + room]
            room -= len(ids)
            pieces.append((answer, Part(answer.held, ids)))
        return pieces

    def _next_token(self, answer: BatchedAnswer, *, alone: bool) -> Part:
        """Return the last token, which is not computed yet; alone it may have a proposal behind."""
        assert answer.held is not None
        most = answer.tokens_left - 1
        proposal = answer.proposals.propose(answer.ids, most) if alone else []
        return Part(answer.held, answer.ids[-1:], proposal)

    def _pass(self, pieces: Sequence[tuple[BatchedAnswer, Part]]) -> None:
        def check(layer: int) -> None:
            if all(answer.is_cancelled for answer, _ in pieces):
                raise _AllCancelledError

        start = time.perf_counter()
        logits = self._passes.compute([part for _, part in pieces], exact=True, after_layer=check)
        seconds = time.perf_counter() - start
        self._learn(pieces, seconds)
        row = 0
        for answer, part in pieces:
            rows = logits[row : row + 1 + len(part.proposal)]
            row += len(rows)
            if len(pieces) == 1 and answer.generated_tokens:
                rows = answer.proposals.put(part.proposal, rows, seconds)
            if not answer.unread:
                answer.logits = rows[0]

    def _learn(self, pieces: Sequence[tuple[BatchedAnswer, Part]], seconds: float) -> None:
        """Note how long a pass took."""
        read = sum(len(part.ids) for answer, part in pieces if not answer.generated_tokens)
        decodes = any(answer.generated_tokens for answer, _ in pieces)
        if read:
            self._pieces_of[decodes].add(read, seconds)
        else:
            self._decoding_seconds = seconds

    def _room(self, decodes: bool) -> int:
        """Return how many tokens of prompts the next pass may have."""
        patience = max(_PATIENCE, _PASSES * self._decoding_seconds) if decodes else _PATIENCE_ALONE
        return self._pieces_of[decodes].choose(patience)

    def _sample(self, answer: BatchedAnswer) -> None:
        """Add the next token to an answer whose logits are there."""
        if answer.logits is None or answer.has_ended:
            return
        try:
            answer.logits = self._passes.checked(answer.logits)
            answer.ids.append(answer.sampler.sample(answer.logits, answer.ids))
        except MixchatError as error:
            answer.error = error

    def _begin(self, answer: BatchedAnswer, begun: Sequence[BatchedAnswer]) -> bool:
        """Give an answer the cache that helps it most; return False where it has to wait."""
        prompt = answer.ids[:-1]  # at least one token is computed, since caches have no logits
        best = max(self._engine.sequences, key=lambda held: held.shared_with(prompt))
        shared = best.shared_with(prompt)
        worth = shared + _WORTH_WAITING
        if self._shares and any(shared_beginning(each.ids, prompt) >= worth for each in begun):
            return False
        held = self._free[0]
        if not self._shares:
            held.cut(0)
        elif shared >= _WORTH_COPYING:
            # One that would lose most of what it holds is copied, if there is another.
            others = [each for each in self._free if each is not best]
            in_place = best in self._free and (2 * shared >= len(best.ids) or not others)
            held = best if in_place else others[0]
            if not in_place and shared > held.shared_with(prompt):
                held.copy_from(best, shared)
        answer.reused_tokens = held.shared_with(prompt)
        held.cut(answer.reused_tokens)
        self._free.remove(held)
        answer.held = held
        return True

    def _remove(self, answer: BatchedAnswer) -> None:
        self._answers.remove(answer)
        if answer.held is not None:
            self._free.append(answer.held)


class _AllCancelledError(Exception):
    """Nobody waits for the pass any more."""
