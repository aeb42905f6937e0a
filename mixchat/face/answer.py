"""The text of an answer while it is generated, with its ids, and why it ended."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from mixchat.engine.answer import EndReason
from mixchat.face.events import COMPLETE, Reason
from mixchat.text.detokenizer import Detokenizer, StopStrings
from mixchat.text.messages import Message
from mixchat.text.thinking import AnswerText, ThinkingParser
from mixchat.text.tool_call import CallDelta, joined_calls


class AnswerState:
    r"""Takes ids, returns text to show, and the thinking before it, which has no stop strings.

    The next turn is built from the ids. If the text was cut, they have to end with it. With the
    stop string "\n\n" and the tokens `A` `.` `\n` `\nB` the text shown is `A.`, which ends with
    the second token, so two ids are remembered. With `A` `.\n` `\nB` no token ends there, so the
    text alone is remembered, and the template will encode it.

    An answer ends at one of the strings `stop`, at a mark of its parser, or where the answer loop
    ends it.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        parser: ThinkingParser,
        *,
        stop: Sequence[str] = (),
    ) -> None:
        self.ids: list[int] = []
        self.text = self.thinking = ""
        self._calls: list[CallDelta] = []
        self.reason: Reason = "interrupted"
        self._cut = self._whole = False
        self._detokenizer, self._parser = detokenizer, parser
        self._stops = StopStrings(stop)
        self._length = 0
        self._ends: list[int] = []

    @property
    def has_ended(self) -> bool:
        """Return whether an id has ended the answer, so that `reason` is known."""
        return self.reason != "interrupted"

    @property
    def thinking_tokens(self) -> int:
        """Return how many ids are thinking so far."""
        start = self._parser.start
        if start is None:
            return len(self.ids)
        return bisect_left(self._ends, start) + 1 if start > 0 else 0

    def add(self, token: int, end: EndReason | None = None) -> AnswerText:
        """Take the next id. Return the text to show, which may be empty.

        end: why the answer loop ends the answer with this id.
        """
        mark = self._parser.marks.get(token)
        if end == "stop" or (mark is not None and self._parser.ends_at(mark)):
            return self._end("stop")
        self.ids.append(token)
        self._ends.append(self._length)
        text = self._show(self._detokenizer.add(token))
        if mark is not None:
            text += self._show(self._detokenizer.flush())
            self._length += 1
            self._ends[-1] = self._length
            text += self._remember(self._parser.mark(mark))
        return text if self._cut or end is None else text + self._end(end)

    def _end(self, reason: Reason) -> AnswerText:
        """Return the text that was held back, because no more ids will come."""
        self.reason = reason
        text = self._show(self._detokenizer.flush()) + self._remember(self._parser.flush())
        if not self._cut:
            self._whole = True
            held = self._stops.flush()
            self.text += held
            text += AnswerText(held)
        if reason == "stop" and self._parser.calls:
            self.reason = "tool_calls"
        return text

    def message(self, earlier: Message | None = None) -> Message | None:
        """Return the message to remember, joined to `earlier`, or None if nothing new was shown."""
        if not (self._whole or self._cut or self.text or self.thinking):
            return None
        ids, thought = None if self._calls else self._shown_ids(), self.thinking_tokens
        if ids is not None:
            thought = min(thought, len(ids))
        earlier = earlier or Message("assistant", "", ())
        return Message(
            "assistant",
            earlier.content + self.text,
            None if ids is None or earlier.ids is None else earlier.ids + ids,
            self.reason not in COMPLETE,
            earlier.thinking + self.thinking,
            earlier.thinking_tokens + thought,
            joined_calls(tuple(self._calls)),
        )

    def _show(self, text: str) -> AnswerText:
        self._length += len(text)
        if self._ends:
            self._ends[-1] = self._length
        return self._remember(self._parser.add(text))

    def _remember(self, new: AnswerText) -> AnswerText:
        """Return as much of the new text as can be no part of a stop string."""
        shown, stopped = self._stops.add(new.text)
        self.text += shown
        self.thinking += new.thinking
        self._calls += new.calls
        if stopped:
            self.reason, self._cut = "stop_string", True
        return AnswerText(shown, new.thinking, new.calls)

    def _shown_ids(self) -> tuple[int, ...] | None:
        """Return the ids of what was shown, None if a token is only in part of it."""
        start = self._parser.start
        if start is not None and start > 0 and not self._is_end(start):
            return None
        if self._whole:
            return tuple(self.ids)
        end = self._length if start is None else start + len(self.text)
        return tuple(self.ids[: bisect_left(self._ends, end) + 1]) if self._is_end(end) else None

    def _is_end(self, position: int) -> bool:
        """Return whether a token ends at this position of the text."""
        at = bisect_left(self._ends, position)
        return at < len(self._ends) and self._ends[at] == position
