"""An answer from its request to its last event: its tokens become text, and that becomes events."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Set
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

from mixchat.base.options import SamplingOptions
from mixchat.engine.answer import TokenAnswer
from mixchat.face.events import COMPLETE, End, Failed, LeftOut, Piece, Reading, Reason, TokenLogprob
from mixchat.text.detokenizer import Detokenizer, StopStrings
from mixchat.text.messages import Message
from mixchat.text.thinking import AnswerText
from mixchat.text.tool_call import CallDelta, joined_calls

if TYPE_CHECKING:
    from mixchat.engine.batch import Batch
    from mixchat.experts.cache import ExpertStats
    from mixchat.experts.holder import ExpertHolder
    from mixchat.face.prompt import Prompt
    from mixchat.face.request import Request
    from mixchat.text.thinking import ThinkingParser
    from mixchat.text.tokenizer import Tokenizer

# Gets each event in the model's thread, and must not raise. The last one is End or Failed.
Sink: TypeAlias = "Callable[[LeftOut | Reading | Piece | End | Failed], object]"
_READING_INTERVAL_S = 0.1  # between two events of progress, of which each layer could give one


class RunningAnswer(TokenAnswer):
    r"""An answer that gives its sink events. Any thread may call `cancel` and `message`.

    It ends at a string of `request.stop`, at a mark of its parser, or where the batch ends it.
    Thinking has no stop strings.

    The next turn is built from the ids. If the text was cut, they have to end with it. With the
    stop string "\n\n" and the tokens `A` `.` `\n` `\nB` the text shown is `A.`, which ends with
    the second token, so two ids are remembered. With `A` `.\n` `\nB` no token ends there, so the
    text alone is remembered, and the template will encode it.

    request: has all sampling options, with a seed, and the requested limit of tokens. max_tokens:
    that limit within the context.
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
        self._request = request
        self._prompt = prompt
        self.sink = sink
        self._parser = parser
        self._detokenizer = Detokenizer(
            tokenizer.token_bytes, prompt.ids if prompt.continues else ()
        )
        self._stops = StopStrings(request.stop)
        self.reason: Reason = "interrupted"  # until a token ends the answer
        self.text = self.thinking = ""
        self._calls: list[CallDelta] = []
        self._is_cut = self._is_whole = False  # at a stop string, or all was shown
        self._length, self._ends = 0, list[int]()  # of all text, and where each token ends in it
        self._tokens: list[TokenLogprob] = []  # since the last piece
        self._tokens_seen = 0
        self._is_thinking = False
        self._tokens_told, self._next_reading = -1, 0.0  # of the prompt
        self._experts: ExpertStats | None = None  # at the start
        self._lock = threading.Lock()  # guards the text
        self.wake: Callable[[], object] = lambda: None  # lets the model's thread look at it

    def cancel(self) -> None:
        """End the answer soon. A pass is given up after a layer if nobody waits for it."""
        super().cancel()
        self.wake()

    def is_ready(self, *, may_prepare: bool) -> bool:
        """Return whether `begin` should be called.

        If not, and `may_prepare`, compile the constraint in the background and then call `wake`.
        """
        if self._prompt.constraint is None or self.error is not None:
            return True
        if self.constraint is None and may_prepare:
            try:
                self.constraint = self._prompt.constraint(self._parser, self.max_tokens)
            except Exception as error:
                self.error = error
                return True
            self.constraint.compiled.add_done_callback(lambda compiled: self.wake())
        return self.constraint is not None and self.constraint.compiled.done()

    def begin(self, batch: Batch, experts: ExpertHolder) -> None:
        """Let a batch compute the answer with the model's experts. Raises as `Batch.add` does."""
        if self.error is not None:
            raise self.error
        self._experts = experts.stats
        batch.add(self)
        if self._prompt.left_out:
            self.sink(LeftOut.of(self._prompt.left_out))

    def note_read(self, tokens: int) -> None:
        """Report the progress of prompt processing, its beginning and end always."""
        now = time.monotonic()
        total = self.tokens_to_read
        is_due = now >= self._next_reading or tokens == total
        if tokens > self._tokens_told and is_due and not self.is_cancelled:
            self._tokens_told = tokens
            self._next_reading = now + _READING_INTERVAL_S
            self.sink(Reading(tokens, total))

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

    def _take(self) -> None:
        """Take the last token, and report a piece if it shows something or counts as thinking."""
        token = self.ids[-1]
        if self._request.top_logprobs is not None and self.logits is not None:
            from mixchat.engine.sampling import log_probabilities

            own, top = log_probabilities(self.logits, token, self._request.top_logprobs)
            self._tokens.append(TokenLogprob(token, own, top))
        with self._lock:
            new = self._read(token)
        is_over = self.reason != "interrupted"
        if is_over:
            self.is_cancelled = True  # a stop string is none of the batch's business
        self._is_thinking = (self._is_thinking or new.thinking != "") and not new.text
        shows = new.text or new.thinking or new.calls or (is_over and self._tokens)
        if not shows and (is_over or not self._is_thinking):
            return
        tokens: tuple[TokenLogprob, ...] = ()
        if shows:
            tokens = tuple(self._tokens)
            self._tokens = []
        self.sink(Piece(new.text, new.thinking, new.calls, tokens, self._thinking_tokens))

    def _read(self, token: int) -> AnswerText:
        """Return the text that the last token shows, which may be empty."""
        mark = self._parser.marks.get(token)
        end = self.end
        if end == "stop" or (mark is not None and self._parser.ends_at(mark)):
            return self._finish("stop")
        self._ends.append(self._length)
        text = self._parse(self._detokenizer.add(token))
        if mark is not None:
            text += self._parse(self._detokenizer.flush())
            self._length += 1
            self._ends[-1] = self._length
            text += self._show(self._parser.mark(mark))
        return text if self._is_cut or end is None else text + self._finish(end)

    def _finish(self, reason: Reason) -> AnswerText:
        """Return the text that was held back, because no more tokens will come."""
        self.reason = reason
        text = self._parse(self._detokenizer.flush()) + self._show(self._parser.flush())
        if not self._is_cut:
            self._is_whole = True
            held = self._stops.flush()
            self.text += held
            text += AnswerText(held)
        if reason == "stop" and self._parser.calls:
            self.reason = "tool_calls"
        return text

    def _parse(self, text: str) -> AnswerText:
        self._length += len(text)
        if self._ends:
            self._ends[-1] = self._length
        return self._show(self._parser.add(text))

    def _show(self, new: AnswerText) -> AnswerText:
        """Return as much of the new text as can be no part of a stop string."""
        shown, is_stopped = self._stops.add(new.text)
        self.text += shown
        self.thinking += new.thinking
        self._calls += new.calls
        if is_stopped:
            self.reason = "stop_string"
            self._is_cut = True
        return AnswerText(shown, new.thinking, new.calls)

    def last_event(self, experts: ExpertHolder) -> End:
        stats = replace(self.stats)
        if self._experts is not None:
            stats.experts = experts.stats.since(self._experts)
        thought = self._thinking_tokens
        seed = self.sampling.seed
        return End(self.reason, stats, thought, seed, self.message(), self._is_thinking)

    def message(self) -> Message | None:
        """Return the message to remember so far, joined to the answer that is continued.

        None if nothing was shown.
        """
        with self._lock:
            if not (self._is_whole or self._is_cut or self.text or self.thinking):
                return None
            ids = None if self._calls else self._shown_ids()
            thought = self._thinking_tokens
            if ids is not None:
                thought = min(thought, len(ids))
            earlier = self._prompt.answered or Message("assistant", "", ())
            return Message(
                "assistant",
                earlier.content + self.text,
                None if ids is None or earlier.ids is None else earlier.ids + ids,
                self.reason not in COMPLETE,
                earlier.thinking + self.thinking,
                earlier.thinking_tokens + thought,
                joined_calls(tuple(self._calls)),
            )

    @property
    def _thinking_tokens(self) -> int:
        """Return how many tokens are thinking so far."""
        start = self._parser.start
        if start is None:
            return len(self._ends)
        return bisect_left(self._ends, start) + 1 if start > 0 else 0

    def _shown_ids(self) -> tuple[int, ...] | None:
        """Return the ids of what was shown, None if a token is only in part of it."""
        first = self.stats.prompt_tokens
        start = self._parser.start
        if start is not None and start > 0 and not self._is_end(start):
            return None
        if self._is_whole:
            return tuple(self.ids[first : first + len(self._ends)])
        end = self._length if start is None else start + len(self.text)
        if not self._is_end(end):
            return None
        return tuple(self.ids[first : first + bisect_left(self._ends, end) + 1])

    def _is_end(self, position: int) -> bool:
        """Return whether a token ends at this position of the text."""
        at = bisect_left(self._ends, position)
        return at < len(self._ends) and self._ends[at] == position

    def close(self) -> None:
        """Give back what only a running answer needs. Its counts and its message stay.

        As garbage, which an error's traceback and this object would be, sixty answers kept ten
        processes.
        """
        self.wake = lambda: None
        self.error = self.logits = None
        constraint = self.constraint
        self.constraint = None
        if constraint is not None:
            constraint.close()
