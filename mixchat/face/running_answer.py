"""An answer from its prompt to its end: tokens of the batch become events."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from mixchat.engine.answer_request import AnswerRequest
from mixchat.engine.stats import GenerationStats
from mixchat.face.answer import AnswerState
from mixchat.face.events import End, Failed, LeftOut, Piece, Reading, Reason, TokenLogprob
from mixchat.text.detokenizer import Detokenizer

if TYPE_CHECKING:
    from mixchat.engine.batch import Batch, BatchedAnswer
    from mixchat.engine.sampling import Constraint
    from mixchat.experts.cache import ExpertStats
    from mixchat.experts.holder import ExpertHolder
    from mixchat.face.prompt import Prompt
    from mixchat.face.request import Request
    from mixchat.text.messages import Message
    from mixchat.text.thinking import ThinkingParser
    from mixchat.text.tokenizer import Tokenizer

# Gets each event in the model's thread, and must not raise. The last one is End or Failed.
Sink: TypeAlias = "Callable[[LeftOut | Reading | Piece | End | Failed], object]"
_READING_INTERVAL_S = 0.1  # between two events of progress, of which each layer could give one


class RunningAnswer:
    """An answer that waits or is computed. Any thread may call `cancel`, `message` and `stats`.

    batch_request: has its sampling and the most tokens of the answer.
    """

    def __init__(
        self,
        request: Request,
        prompt: Prompt,
        sink: Sink,
        batch_request: AnswerRequest,
        tokenizer: Tokenizer,
        parser: ThinkingParser,
    ) -> None:
        self._request, self._prompt, self.sink = request, prompt, sink
        self._batch_request, self._parser = batch_request, parser
        self._stats = GenerationStats(len(prompt.ids))
        self._state = AnswerState(
            Detokenizer(tokenizer.token_bytes, prompt.ids if prompt.continues else ()),
            parser,
            stop=request.stop,
        )
        self._tokens: list[TokenLogprob] = []  # since the last piece
        self._tokens_seen, self._is_thinking = 0, False
        self._tokens_read, self._next_reading = -1, 0.0
        self._constraint: Constraint | None = None
        self._error: Exception | None = None  # of what makes the constraint
        self._experts: ExpertStats | None = None  # at the start
        self._lock = threading.Lock()  # guards `_state`
        self.answer: BatchedAnswer | None = None
        self.is_cancelled = False

    @property
    def stats(self) -> GenerationStats:
        """Return the counts and seconds so far."""
        return replace(self._stats)

    def message(self) -> Message | None:
        """Return the message to remember so far, None if nothing was shown."""
        with self._lock:
            return self._state.message(self._prompt.answered)

    def cancel(self) -> None:
        """End the answer soon. `report` tells when."""
        self.is_cancelled = True
        if (answer := self.answer) is not None:
            answer.cancel()

    @property
    def has_constraint(self) -> bool:
        """Return whether the constraint's process runs."""
        return self._constraint is not None

    def is_ready(self, wake: Callable[[], object], *, may_prepare: bool) -> bool:
        """Return whether `begin` should be called.

        If not, and `may_prepare`, compile the constraint in the background and then call `wake`.
        """
        if self._prompt.constraint is None or self._error is not None:
            return True
        if self._constraint is None and may_prepare:
            try:
                self._constraint = self._prompt.constraint(self._parser)
            except Exception as error:
                self._error = error
                return True
            self._constraint.compiled.add_done_callback(lambda compiled: wake())
        return self._constraint is not None and self._constraint.compiled.done()

    def begin(self, batch: Batch, experts: ExpertHolder) -> None:
        """Let a batch compute the answer with the model's experts. Raises as `Batch.add` does."""
        if self._error is not None:
            raise self._error
        self._experts = experts.stats
        request = replace(self._batch_request, constraint=self._constraint, on_prefill=self._read)
        self.answer = batch.add(request)
        self._stats = self.answer.stats
        if self.is_cancelled:  # meanwhile
            self.answer.cancel()
        if self._prompt.left_out:
            self.sink(LeftOut.of(self._prompt.left_out))

    def report(self, experts: ExpertHolder) -> End | Failed | None:
        """Give the sink the news of a pass, but return the last event.

        To read the counts of experts takes a while. It is done for the first token and at the end.
        """
        answer = self.answer
        assert answer is not None
        if answer.error is not None:
            return Failed(answer.error)
        if answer.generated_tokens > self._tokens_seen:
            self._tokens_seen += 1
            self._take(answer)
            if self._tokens_seen == 1 and self._experts is not None:
                used, stats = experts.stats.since(self._experts), answer.stats
                stats.prefill_waiting_seconds = used.stalled_seconds
                stats.prefill_bytes_read = used.bytes_read
        return self.end(self._state.reason, experts) if answer.has_ended else None

    def end(self, reason: Reason, experts: ExpertHolder | None = None) -> End:
        """Return the last event."""
        stats = self.stats
        if experts is not None and self._experts is not None:
            stats.experts = experts.stats.since(self._experts)
        return End(
            reason,
            stats,
            self._state.thinking_tokens,
            self._batch_request.sampling.seed,
            self.message(),
            self._is_thinking,
        )

    def close(self) -> None:
        """Give back what only a running answer needs. `stats` and `message` stay.

        As garbage, which this object and the batch's would be, sixty answers kept ten processes.
        """
        self.answer = None
        constraint, self._constraint = self._constraint, None
        if constraint is not None:
            constraint.close()

    def counts(self) -> tuple[int, int, int]:
        """Return the computed, cached and generated tokens."""
        if self.answer is None:
            return 0, 0, 0
        stats = self.answer.stats
        return self.answer.tokens_read, stats.reused_tokens, stats.generated_tokens

    def _read(self, done: int, total: int) -> None:
        """Report the progress of prompt processing, its beginning and end always."""
        now = time.monotonic()
        is_due = now >= self._next_reading or done == total
        if done > self._tokens_read and is_due and not self.is_cancelled:
            self._tokens_read, self._next_reading = done, now + _READING_INTERVAL_S
            self.sink(Reading(done, total))

    def _take(self, answer: BatchedAnswer) -> None:
        """Take a token, and report a piece if it shows something or counts as thinking."""
        token = answer.ids[-1]
        if self._request.top_logprobs is not None and answer.logits is not None:
            from mixchat.engine.sampling import log_probabilities

            own, top = log_probabilities(answer.logits, token, self._request.top_logprobs)
            self._tokens.append(TokenLogprob(token, own, top))
        state = self._state
        with self._lock:
            new = state.add(token, answer.end)
        if state.has_ended:
            answer.cancel()  # a stop string is none of the batch's business
        self._is_thinking = (self._is_thinking or new.thinking != "") and not new.text
        shows = new.text or new.thinking or new.calls or (state.has_ended and self._tokens)
        if not shows and (state.has_ended or not self._is_thinking):
            return
        tokens: tuple[TokenLogprob, ...] = ()
        if shows:
            tokens, self._tokens = tuple(self._tokens), []
        self.sink(Piece(new.text, new.thinking, new.calls, tokens, state.thinking_tokens))
