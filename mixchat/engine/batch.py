"""The answer loop. A pass computes the next token of each answer, and pieces of new prompts.

Several answers read an expert once for all tokens that selected it.

V = vocab_size.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from mixchat.base import interrupts
from mixchat.base.errors import MixchatError
from mixchat.engine.answer import TokenAnswer
from mixchat.engine.chunk_sizer import PassSizer
from mixchat.engine.passes import (
    CachedPrefix,
    ForwardPasses,
    PassTooLargeError,
    SequenceTokens,
    shared_beginning,
)
from mixchat.engine.sampling import Sampler
from mixchat.engine.speculation import Proposals, Speculation

# Tokens that another prompt of the pass computes, so that waiting for it pays.
_MIN_SHARED_TO_WAIT = 16
# Tokens. All prompts of a model share the first ones of its template.
_MIN_SHARED_TO_COPY = 4
# Tokens at the end of a prompt in which a template begins the answer, such as <think>. Later
# prompts may lack them, because thinking is left out of the history.
_ANSWER_START_TOKENS = 16

_Pass = list[tuple[TokenAnswer, SequenceTokens]]


class Batch:
    """The answers that an engine computes now, at most one for each of its sequences.

    exact_prompts: compute prompts with the bits of decoding. chunk: tokens of a prompt in a pass.
    None: sized so that running answers keep decoding. shared_prefix: let an answer reuse earlier
    prompts.
    """

    def __init__(
        self,
        passes: ForwardPasses,
        sequences: Sequence[CachedPrefix],
        speculation: Speculation | None,
        *,
        exact_prompts: bool = True,
        chunk: int | None = None,
        shared_prefix: bool = True,
    ) -> None:
        self._passes = passes
        self._sequences = sequences
        self._speculation = speculation
        self._exact_prompts = exact_prompts
        self._shares = shared_prefix
        # The least recently used comes first. At the start, empty ones come first.
        self._free = sorted(sequences, key=lambda prefix: bool(prefix.ids))
        self._answers: list[TokenAnswer] = []
        self._sizer = PassSizer(chunk)
        self._has_decoded = False  # in the last pass

    @property
    def _decodes(self) -> bool:
        """Return whether a running answer has its first token."""
        return any(answer.generated_tokens and not answer.has_ended for answer in self._answers)

    @property
    def capacity(self) -> int:
        return len(self._sequences)

    @property
    def size(self) -> int:
        return len(self._answers)

    def add(self, answer: TokenAnswer) -> TokenAnswer:
        """Begin an answer, whose prompt and `max_tokens` fit into the context, and return it."""
        assert self.size < self.capacity
        start = time.perf_counter()
        with interrupts.deferred():
            self._passes.experts.begin_turn()
        answer.sampler = Sampler(answer.sampling, answer.stop_ids, answer.constraint)
        answer.proposals = Proposals(self._speculation, answer.stop_ids)
        answer.stats.speculation = answer.proposals.stats
        answer.stats.prefill_seconds = time.perf_counter() - start
        self._answers.append(answer)
        self._sizer.recover()
        return answer

    def step(self) -> list[TokenAnswer]:
        """Compute one pass. Return the answers with something new: a token, progress, or an end.

        Answers that have ended leave the batch. An error is stored in the answers that it hit.
        """
        ended = [answer for answer in self._answers if answer.has_ended]
        active = [answer for answer in self._answers if not answer.has_ended]
        start = time.perf_counter()
        # Verified logits need no pass, so the other answers wait for the next step.
        computed = [answer for answer in active if _take_verified(answer)]
        if not computed and (chunks := self._next_pass(active)):
            computed = [answer for answer, _ in chunks]
            try:
                self._run_pass(chunks)
            except _AllCancelledError:
                pass
            except PassTooLargeError:
                self._sizer.shrink(max(len(chunk.ids) for _, chunk in chunks))
                computed = []  # the same tokens come with the next passes
            except MixchatError as error:
                for answer in computed:
                    answer.error = error
        seconds = time.perf_counter() - start
        for answer in computed:
            self._sample(answer, seconds)
        for answer in [*ended, *(answer for answer in computed if answer.has_ended)]:
            self._answers.remove(answer)
            del answer.sampler, answer.proposals  # which keep logits
            if answer.prefix is not None:
                self._free.append(answer.prefix)
                answer.prefix = None
        return [*ended, *computed]

    def _next_pass(self, answers: Sequence[TokenAnswer]) -> _Pass:
        """Return each running answer's last token, and chunks of new prompts in the room left.

        If the model decodes apart, tokens and chunks take turns.
        """
        # Several answers fill a pass without proposals, and `Speculation` compares lone passes.
        propose = len(answers) == 1
        chunks = [
            (answer, _last_token(answer, propose=propose))
            for answer in answers
            if answer.generated_tokens
        ]
        if self._passes.model.decodes_apart:
            if self._has_decoded and len(chunks) < len(answers):
                chunks = []
            self._has_decoded = bool(chunks)
            if chunks:
                return chunks
        room = self._sizer.choose(decodes=self._decodes)
        reading: list[TokenAnswer] = []
        for answer in answers:
            if answer.generated_tokens or room <= 0:
                continue
            if answer.prefix is None and not self._assign_cache(answer, reading):
                continue
            assert answer.prefix is not None
            reading.append(answer)
            start = answer.prefix.cache.length
            ids = answer.ids[start : start + room]
            room -= len(ids)
            chunks.append((answer, SequenceTokens(answer.prefix, ids)))
        return chunks

    def _run_pass(self, chunks: _Pass) -> None:
        """Compute the pass, and give each answer its logits if its prompt is complete."""
        layers = self._passes.model.config.num_hidden_layers
        reading = [(answer, chunk) for answer, chunk in chunks if not answer.generated_tokens]

        def after_layer(layer: int) -> None:
            if all(answer.is_cancelled for answer, _ in chunks):
                raise _AllCancelledError
            for answer, chunk in reading:
                # Of 100 tokens, a layer of 32 counts as 3.
                done = answer.tokens_read + len(chunk.ids) * (layer + 1) // layers
                answer.note_read(done)

        start = time.perf_counter()
        logits = self._passes.compute(
            [chunk for _, chunk in chunks],
            # An answer that decodes must not depend on the prompts that share its pass.
            exact=self._exact_prompts or len(reading) < len(chunks),
            after_layer=after_layer,
        )
        seconds = time.perf_counter() - start
        prompt_tokens = sum(len(chunk.ids) for _, chunk in reading)
        self._sizer.add(prompt_tokens, seconds, decodes=self._decodes)
        counts = [1 + len(chunk.proposal) for _, chunk in chunks]
        for (answer, chunk), rows in zip(chunks, torch.split(logits, counts), strict=True):
            if not answer.generated_tokens:
                answer.tokens_read += len(chunk.ids)
            elif len(chunks) == 1:
                answer.proposals.put(chunk.proposal, rows, seconds)
            if answer.tokens_read == answer.tokens_to_read:
                answer.logits = rows[0]

    def _sample(self, answer: TokenAnswer, seconds: float) -> None:
        """Count a pass's seconds, and append the next token if its logits are known."""
        if answer.generated_tokens:
            answer.stats.decode_seconds += seconds
        else:
            answer.stats.prefill_seconds += seconds
        if answer.logits is None or answer.has_ended:
            return
        try:
            answer.logits = self._passes.checked(answer.logits)
            answer.ids.append(answer.sampler.sample(answer.logits, answer.ids))
            answer.stats.generated_tokens += 1
        except Exception as error:  # of this answer alone, such as a constraint's process
            answer.error = error

    def _assign_cache(self, answer: TokenAnswer, reading: Sequence[TokenAnswer]) -> bool:
        """Give an answer a cache. Return False if it waits to copy a prompt of this pass."""
        # At least one token is computed, since caches have no logits.
        prompt = answer.ids[:-1]
        prefix = self._free[0]
        if not self._shares:
            prefix.cut(0)
        else:
            best = max(self._sequences, key=lambda sequence: sequence.shared_with(prompt))
            shared = best.shared_with(prompt)
            for reader in reading:
                common = shared_beginning(reader.ids, prompt)
                if reader.prefix and common >= shared + _MIN_SHARED_TO_WAIT:
                    reader.prefix.cache.add_checkpoint(common)
                    return False
            if shared >= _MIN_SHARED_TO_COPY:
                targets = [sequence for sequence in self._free if sequence is not best]
                # A cache that would lose most of its tokens is copied, if another one is free.
                if best in self._free and (2 * shared >= len(best.ids) or not targets):
                    prefix = best
                else:
                    prefix = targets[0]
                    if shared > prefix.shared_with(prompt):
                        prefix.copy_from(best, shared)
        # Where two prompts part, a third one may, too.
        parted = max(shared_beginning(sequence.ids, prompt) for sequence in self._sequences)
        reused = prefix.shared_with(prompt)
        answer.stats.reused_tokens = reused
        answer.stats.repeated_tokens = shared_beginning(prefix.ids, prompt) - reused
        prefix.cut(reused)
        # Messages end with a stop token in most templates.
        ends = [n + 1 for n, token in enumerate(prompt) if token in answer.stop_ids]
        before_answer = len(prompt) - _ANSWER_START_TOKENS
        prefix.cache.begin((before_answer, len(prompt)), (reused, parted, *ends))
        self._free.remove(prefix)
        answer.prefix = prefix
        answer.note_read(0)
        return True


def _take_verified(answer: TokenAnswer) -> bool:
    """Take the logits after the last token, if an earlier pass computed them.

    The token joins the cache only now, so an answer that ends leaves it as without speculation.
    """
    if answer.prefix is None or not answer.generated_tokens:
        return False
    logits = answer.proposals.take(answer.ids[-1])
    if logits is None:
        return False
    with interrupts.deferred():
        answer.prefix.add(answer.ids[-1:])
        answer.prefix.cache.advance(1)
    answer.logits = logits
    return True


def _last_token(answer: TokenAnswer, *, propose: bool) -> SequenceTokens:
    """Return the last token and perhaps a proposal."""
    assert answer.prefix is not None
    most = answer.max_tokens - answer.generated_tokens - 1
    proposal = answer.proposals.propose(answer.ids, most) if propose else []
    return SequenceTokens(answer.prefix, answer.ids[-1:], proposal)


class _AllCancelledError(Exception):
    """Nobody waits for the pass any more."""
