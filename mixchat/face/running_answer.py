"""An answer from its prompt to its end: tokens of the batch become events."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Set
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from mixchat.base.options import SamplingOptions
from mixchat.engine.answer import TokenAnswer
from mixchat.face.answer import AnswerState
from mixchat.face.events import End, Failed, LeftOut, Piece, Reading, TokenLogprob
from mixchat.text.detokenizer import Detokenizer

if TYPE_CHECKING:
    from mixchat.engine.batch import Batch
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


class RunningAnswer(TokenAnswer):
    """An answer that gives its sink events. Any thread may call `cancel` and `message`.

    request: has all options of its sampling, with a seed, and the limit of the answer's tokens.
    max_tokens: of these, as many as fit.
    """

    def __init__(
        self,
        request: Request,
        prompt: Prompt,
        sink: Sink,
        tokenizer: Tokenizer,
        parser: ThinkingParser,
        stop_ids: Set[int],
        max_tokens: int,
    ) -> None:
        assert isinstance(request.sampling, SamplingOptions)
        super().__init__(
            prompt.ids,
            request.sampling,
            stop_ids,
            max_tokens,
            at_max="length" if max_tokens == request.max_tokens else "context",
        )
        self._request, self._prompt, self.sink, self._parser = request, prompt, sink, parser
        self._state = AnswerState(
            Detokenizer(tokenizer.token_bytes, prompt.ids if prompt.continues else ()),
            parser,
            stop=request.stop,
        )
        self._tokens: list[TokenLogprob] = []  # since the last piece
        self._tokens_seen, self._is_thinking = 0, False
        self._tokens_told, self._next_reading = -1, 0.0  # of the prompt
        self._experts: ExpertStats | None = None  # at the start
        self._lock = threading.Lock()  # guards `_state`

    def message(self) -> Message | None:
        """Return the message to remember so far, None if nothing was shown."""
        with self._lock:
            return self._state.message(self._prompt.answered)

    def is_ready(self, wake: Callable[[], object], *, may_prepare: bool) -> bool:
        """Return whether `begin` should be called.

        If not, and `may_prepare`, compile the constraint in the background and then call `wake`.
        """
        if self._prompt.constraint is None or self.error is not None:
            return True
        if self.constraint is None and may_prepare:
            try:
                self.constraint = self._prompt.constraint(self._parser)
            except Exception as error:
                self.error = error
                return True
            self.constraint.compiled.add_done_callback(lambda compiled: wake())
        return self.constraint is not None and self.constraint.compiled.done()

    def begin(self, batch: Batch, experts: ExpertHolder) -> None:
        """Let a batch compute the answer with the model's experts. Raises as `Batch.add` does."""
        if self.error is not None:
            raise self.error
        self._experts = experts.stats
        batch.add(self)
        if self._prompt.left_out:
            self.sink(LeftOut.of(self._prompt.left_out))

    def report(self, experts: ExpertHolder) -> End | Failed | None:
        """Give the sink the news of a pass, but return the last event.

        To read the counts of experts takes a while. It is done for the first token and at the end.
        """
        if self.error is not None:
            return Failed(self.error)
        if self.generated_tokens > self._tokens_seen:
            self._tokens_seen += 1
            self._take()
            if self._tokens_seen == 1 and self._experts is not None:
                used = experts.stats.since(self._experts)
                self.stats.prefill_waiting_seconds = used.stalled_seconds
                self.stats.prefill_bytes_read = used.bytes_read
        return self.last_event(experts) if self.has_ended else None

    def last_event(self, experts: ExpertHolder) -> End:
        stats = replace(self.stats)
        if self._experts is not None:
            stats.experts = experts.stats.since(self._experts)
        return End(
            self._state.reason,
            stats,
            self._state.thinking_tokens,
            self.sampling.seed,
            self.message(),
            self._is_thinking,
        )

    def close(self) -> None:
        """Give back what only a running answer needs. Its counts and its message stay.

        As garbage, which an error's traceback and this object would be, sixty answers kept ten
        processes.
        """
        self.error = self.logits = None
        constraint, self.constraint = self.constraint, None
        if constraint is not None:
            constraint.close()

    def note_read(self, tokens: int) -> None:
        """Report the progress of prompt processing, its beginning and end always."""
        now, total = time.monotonic(), self.tokens_to_read
        is_due = now >= self._next_reading or tokens == total
        if tokens > self._tokens_told and is_due and not self.is_cancelled:
            self._tokens_told, self._next_reading = tokens, now + _READING_INTERVAL_S
            self.sink(Reading(tokens, total))

    def _take(self) -> None:
        """Take a token, and report a piece if it shows something or counts as thinking."""
        token = self.ids[-1]
        if self._request.top_logprobs is not None and self.logits is not None:
            from mixchat.engine.sampling import log_probabilities

            own, top = log_probabilities(self.logits, token, self._request.top_logprobs)
            self._tokens.append(TokenLogprob(token, own, top))
        state = self._state
        with self._lock:
            new = state.add(token, self.end)
        if state.has_ended:
            self.cancel()  # a stop string is none of the batch's business
        self._is_thinking = (self._is_thinking or new.thinking != "") and not new.text
        shows = new.text or new.thinking or new.calls or (state.has_ended and self._tokens)
        if not shows and (state.has_ended or not self._is_thinking):
            return
        tokens: tuple[TokenLogprob, ...] = ()
        if shows:
            tokens, self._tokens = tuple(self._tokens), []
        self.sink(Piece(new.text, new.thinking, new.calls, tokens, state.thinking_tokens))
