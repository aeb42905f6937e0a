"""A job with its answer, from tokens to the events that its sink gets."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from mixchat.chat.answer import Answer, Reason
from mixchat.engine.batch import Batch, BatchedAnswer, Prompt
from mixchat.engine.sampling import log_probabilities
from mixchat.serving.service import Delta, Done, Failed, Job, Reading, Sink, TokenLogprob
from mixchat.text.detokenizer import Detokenizer, StopStrings

if TYPE_CHECKING:
    from mixchat.engine.sampling import Constraint
    from mixchat.text.tokenizer import Tokenizer


class RunningJob:
    """A job that waits, or whose answer is in the making. Any thread may call `cancel`."""

    def __init__(self, job: Job, sink: Sink, tokenizer: Tokenizer) -> None:
        self._job, self.sink = job, sink
        context = job.prompt_ids if job.continues_prompt else ()
        self._text = Answer(Detokenizer(tokenizer, context), StopStrings(job.stop))
        self._tokens: list[TokenLogprob] = []  # since the last piece of text
        self._seen, self._unread = 0, len(job.prompt_ids)
        self._counted = (0, 0, 0)
        self._constraint: Constraint | None = None
        self._fault: Exception | None = None  # of what makes it
        self.answer: BatchedAnswer | None = None
        self.is_cancelled = False

    def cancel(self) -> None:
        """End the answer soon; `report` tells when."""
        self.is_cancelled = True
        if self.answer is not None:
            self.answer.cancel()

    @property
    def prepares(self) -> bool:
        """Return whether its form is being compiled, or was, for an answer that has not begun."""
        return self._constraint is not None

    def is_ready(self, wake: Callable[[], object], *, may_prepare: bool) -> bool:
        """Return whether `begin` should be called.

        If not and it `may_prepare`, its form is compiled in the background, and `wake` is called.
        """
        if self._job.constraint is None or self._fault is not None:
            return True
        if self._constraint is None and may_prepare:
            try:
                self._constraint = self._job.constraint()
            except Exception as error:
                self._fault = error
                return True
            self._constraint.compiled.add_done_callback(lambda compiled: wake())
        return self._constraint is not None and self._constraint.compiled.done()

    def begin(self, batch: Batch) -> None:
        """Let a batch compute the answer. Raises as `Batch.add` does."""
        if self._fault is not None:
            raise self._fault
        job, constraint = self._job, self._constraint
        self._constraint = None
        prompt = Prompt(job.prompt_ids, job.sampling, job.stop_ids, job.max_tokens, constraint)
        self.answer = batch.add(prompt)
        if self.is_cancelled:  # meanwhile
            self.answer.cancel()

    def report(self) -> Done | Failed | None:
        """Tell the sink what is new after a pass; return the last event, which it has not got."""
        answer = self.answer
        assert answer is not None
        if answer.error is not None:
            return Failed(answer.error)
        if answer.generated_tokens > self._seen:
            self._seen += 1
            self._take(answer, answer.ids[-1])
        elif answer.unread < self._unread and not answer.is_cancelled:
            self._unread = answer.unread
            total = answer.prompt_tokens - answer.reused_tokens
            self.sink(Reading(total - answer.unread, total))
        if answer.is_cancelled and self._text.reason == "interrupted":
            return self.done("interrupted")
        return self.done(self._text.reason) if answer.has_ended else None

    def done(self, reason: Reason) -> Done:
        """Return the event of an answer that has ended."""
        self._constraint = None  # whose process ends with it
        answer = self.answer
        if answer is None:
            return Done(reason, len(self._job.prompt_ids), 0, 0)
        return Done(reason, answer.prompt_tokens, answer.reused_tokens, answer.generated_tokens)

    def new_tokens(self) -> tuple[int, int, int]:
        """Return the tokens of the prompt that were computed since the last call, those that were
        cached, and those that were generated."""
        answer, before = self.answer, self._counted
        if answer is None or answer.held is None:
            return 0, 0, 0
        computed = answer.prompt_tokens - answer.reused_tokens - answer.unread
        self._counted = computed, answer.reused_tokens, answer.generated_tokens
        return (
            self._counted[0] - before[0],
            self._counted[1] - before[1],
            self._counted[2] - before[2],
        )

    def _take(self, answer: BatchedAnswer, token: int) -> None:
        """Take the next token, and end the answer where it is the last one."""
        if self._job.top_logprobs is not None and answer.logits is not None:
            own, top = log_probabilities(answer.logits, token, self._job.top_logprobs)
            self._tokens.append(TokenLogprob(token, own, top))
        if token in answer.stop_ids:
            self._tell(self._text.end("stop"))
            return
        self._tell(self._text.add(token))
        if self._text.cut:
            answer.cancel()
        elif answer.tokens_left <= 0:
            self._tell(self._text.run_out(self._job.max_tokens))

    def _tell(self, pieces: Iterable[str]) -> None:
        text = "".join(pieces)
        ends = self._text.reason != "interrupted"
        if text or (ends and self._tokens):
            self.sink(Delta(text, tuple(self._tokens)))
            self._tokens.clear()
