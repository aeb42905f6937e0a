"""A job with its answer, from tokens to events."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from mixchat.chat.answer import Answer, AnswerLimits, Reason
from mixchat.engine.batch import AnswerRequest, Batch, BatchedAnswer
from mixchat.engine.sampling import log_probabilities
from mixchat.serving.service import Delta, Done, Failed, Job, Reading, Sink, TokenLogprob
from mixchat.text.detokenizer import Detokenizer
from mixchat.text.tool_parser import answer_parser

if TYPE_CHECKING:
    from mixchat.engine.sampling import Constraint
    from mixchat.text.tokenizer import Tokenizer


class RunningJob:
    """A job that waits or is answered. Any thread may call `cancel`."""

    def __init__(self, job: Job, sink: Sink, tokenizer: Tokenizer, context_size: int) -> None:
        self._job, self.sink = job, sink
        room = context_size - len(job.prompt_ids)
        made = len(job.prompt_ids) - job.begun
        prompt, begun = job.prompt_ids[:made], job.prompt_ids[made:]
        self._parser = answer_parser(job.thinking, job.tools, tokenizer, prompt, begun, job.offered)
        self._text = Answer(
            Detokenizer(tokenizer.token_bytes, job.prompt_ids if job.continues_prompt else ()),
            AnswerLimits(job.stop_ids, job.stop, job.max_tokens, room),
            self._parser,
        )
        self._tokens: list[TokenLogprob] = []  # since the last piece of text
        self._tokens_seen = self._tokens_read = 0
        self._constraint: Constraint | None = None
        self._error: Exception | None = None  # of what makes the constraint
        self.answer: BatchedAnswer | None = None
        self.is_cancelled = False

    def cancel(self) -> None:
        """End the answer soon. `report` tells when."""
        self.is_cancelled = True
        if self.answer is not None:
            self.answer.cancel()

    @property
    def has_constraint(self) -> bool:
        """Return whether a constraint waits for its answer to begin."""
        return self._constraint is not None

    def is_ready(self, wake: Callable[[], object], *, may_prepare: bool) -> bool:
        """Return whether `begin` should be called.

        If not, and `may_prepare`, compile the constraint in the background and then call `wake`.
        """
        if self._job.constraint is None or self._error is not None:
            return True
        if self._constraint is None and may_prepare:
            try:
                self._constraint = self._job.constraint(self._parser)
            except Exception as error:
                self._error = error
                return True
            self._constraint.compiled.add_done_callback(lambda compiled: wake())
        return self._constraint is not None and self._constraint.compiled.done()

    def begin(self, batch: Batch) -> None:
        """Let a batch compute the answer. Raises as `Batch.add` does."""
        if self._error is not None:
            raise self._error
        job, constraint = self._job, self._constraint
        self._constraint = None
        self.answer = batch.add(
            AnswerRequest(job.prompt_ids, job.sampling, job.stop_ids, job.max_tokens, constraint)
        )
        if self.is_cancelled:  # meanwhile
            self.answer.cancel()

    def report(self) -> Done | Failed | None:
        """Tell the sink the news of a pass, but return the last event."""
        answer = self.answer
        assert answer is not None
        if answer.error is not None:
            return Failed(answer.error)
        if answer.generated_tokens > self._tokens_seen:
            self._tokens_seen += 1
            self._take(answer)
        elif answer.tokens_read > self._tokens_read and not answer.is_cancelled:
            self._tokens_read = answer.tokens_read
            self.sink(Reading(answer.tokens_read, answer.tokens_to_read))
        return self.done(self._text.reason) if answer.has_ended else None

    def done(self, reason: Reason) -> Done:
        self._constraint = None  # whose process ends with it
        if self.answer is None:
            return Done(reason, len(self._job.prompt_ids), 0, 0)
        stats = self.answer.stats
        return Done(
            reason,
            stats.prompt_tokens,
            stats.reused_tokens,
            stats.generated_tokens,
            self._text.thinking_tokens,
        )

    def counts(self) -> tuple[int, int, int]:
        """Return the computed, cached and generated tokens."""
        if self.answer is None:
            return 0, 0, 0
        return (
            self.answer.tokens_read,
            self.answer.stats.reused_tokens,
            self.answer.generated_tokens,
        )

    def _take(self, answer: BatchedAnswer) -> None:
        token = answer.ids[-1]
        if self._job.top_logprobs is not None and answer.logits is not None:
            own, top = log_probabilities(answer.logits, token, self._job.top_logprobs)
            self._tokens.append(TokenLogprob(token, own, top))
        new = self._text.add(token)
        if self._text.has_ended:
            answer.cancel()  # a stop string is none of the batch's business
        if new.text or new.thinking or new.calls or (self._text.has_ended and self._tokens):
            self.sink(Delta(new.text, tuple(self._tokens), new.thinking, new.calls))
            self._tokens.clear()
