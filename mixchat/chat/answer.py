"""An answer while it is generated, with its ids, the text that was shown, and why it ended."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Literal

from mixchat.text.detokenizer import Detokenizer, StopStrings
from mixchat.text.messages import Message

Reason = Literal["stop", "length", "stop_string", "interrupted", "context"]
COMPLETE = ("stop", "stop_string")  # the reasons of answers of which nothing is missing


def cut_off_note(tokens: int, more: str) -> str:
    """Return the note on an answer cut off by its limit. `more` is the flag that raises it."""
    return f"cut off after {tokens:,} token{'s' if tokens != 1 else ''}; {more} allows more"


def left_out_note(turns: int) -> str:
    """Return the note on turns that are no longer in the prompt."""
    count = "the oldest turn is" if turns == 1 else f"the {turns} oldest turns are"
    return f"the context is full: {count} left out from here on"


@dataclass(frozen=True)
class AnswerLimits:
    """What ends an answer: a token, a string, or a count of tokens.

    max_tokens: the most tokens that were requested, if any. room: the tokens that the context has
    left.
    """

    stop_ids: Set[int]
    stop: Sequence[str]
    max_tokens: int | None
    room: int


class Answer:
    r"""Takes ids, returns text to show.

    The next turn is built from the ids. If the text was cut, they have to end with it. With the
    stop string "\n\n" and the tokens `A` `.` `\n` `\nB` the text shown is `A.`, which ends with
    the second token, so two ids are remembered. With `A` `.\n` `\nB` no token ends there, so the
    text alone is remembered, and the template will encode it.
    """

    def __init__(self, detokenizer: Detokenizer, limits: AnswerLimits) -> None:
        self.ids: list[int] = []
        self.text = ""
        self.reason: Reason = "interrupted"
        self._cut = self._whole = False
        self._detokenizer, self._limits = detokenizer, limits
        self._stops = StopStrings(limits.stop)
        self._length = 0
        self._ends: list[int] = []

    @property
    def has_ended(self) -> bool:
        """Return whether an id has ended the answer, so that `reason` is known."""
        return self.reason != "interrupted"

    def add(self, token: int) -> str:
        """Take the next id. Return the text to show, which may be empty."""
        limits = self._limits
        if token in limits.stop_ids:
            return self._end("stop")
        self.ids.append(token)
        self._ends.append(self._length)
        text = self._show(self._detokenizer.add(token))
        if self._cut:
            return text
        if limits.max_tokens is not None and len(self.ids) >= limits.max_tokens:
            return text + self._end("length")
        return text + self._end("context") if len(self.ids) >= limits.room else text

    def _end(self, reason: Reason) -> str:
        """Return the text that was held back, because no more ids will come."""
        self.reason = reason
        text = self._show(self._detokenizer.flush())
        if not self._cut:
            self._whole = True
            held = self._stops.flush()
            self.text += held
            text += held
        return text

    def message(self, before: Message | None = None) -> Message | None:
        """Return the message to remember, joined to `before`, or None if nothing new was shown."""
        if not (self._whole or self._cut or self.text):
            return None
        ids = tuple(self.ids) if self._whole else self._ids_of_text()
        content, partial = self.text, self.reason not in COMPLETE
        if before is not None:
            content = before.content + content
            ids = None if ids is None or before.ids is None else before.ids + ids
        return Message("assistant", content, ids, partial)

    def _show(self, text: str) -> str:
        """Take the next text. Return as much of it as can be no part of a stop string."""
        self._length += len(text)
        if self._ends:
            self._ends[-1] = self._length
        shown, stopped = self._stops.add(text)
        self.text += shown
        if stopped:
            self.reason, self._cut = "stop_string", True
        return shown

    def _ids_of_text(self) -> tuple[int, ...] | None:
        count = bisect_left(self._ends, len(self.text)) + 1
        fits = count <= len(self._ends) and self._ends[count - 1] == len(self.text)
        return tuple(self.ids[:count]) if fits else None
