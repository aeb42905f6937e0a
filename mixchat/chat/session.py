"""A conversation: keeps the messages with their token ids, and turns an answer into events."""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from mixchat.text.detokenizer import Detokenizer
from mixchat.text.messages import Message
from mixchat.text.stop import StopStrings

if TYPE_CHECKING:
    from mixchat.engine.generate import Engine, GenerationStats
    from mixchat.engine.sampling import SamplingOptions
    from mixchat.text.messages import Template
    from mixchat.text.tokenizer import Tokenizer

Reason = Literal["stop", "length", "stop_string", "interrupted", "context"]


@dataclass(frozen=True)
class TextDelta:
    """The next piece of the answer."""

    text: str


@dataclass(frozen=True)
class Finished:
    """The last event of an answer: why it ended, what it took, and the seed it was drawn with."""

    reason: Reason
    stats: GenerationStats
    seed: int | None = None


Event = TextDelta | Finished


class ChatSession:
    """One conversation with one engine. The text that was shown is what the next turn remembers."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        template: Template,
        *,
        system: str | None = None,
        sampling: SamplingOptions,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
    ) -> None:
        self.engine = engine
        self.sampling = sampling
        self.max_tokens = max_tokens
        self.messages: list[Message] = []
        self._tokenizer = tokenizer
        self._template = template
        self._system = [] if system is None else [Message("system", system)]
        self._stop = tuple(stop)
        self._turns = 0
        self._begun = self._interrupted = False
        self.clear()

    def clear(self) -> None:
        """Forget everything but the system prompt."""
        self.messages = list(self._system)

    def interrupt(self) -> bool:
        """End the answer that is being given after its next token. A signal handler may call it.

        False if that may take long, because no token has come yet or this was asked before: then
        raise `KeyboardInterrupt`, which ends it at once.
        """
        soon = self._begun and not self._interrupted
        self._interrupted = True
        return soon

    def ask(self, text: str) -> Iterator[Event]:
        """Send `text`; yield the answer piece by piece, then `Finished`.

        An answer that is cut short (`interrupt`, Ctrl-C, closing the iterator) is remembered as far
        as it was shown; if nothing was, or the turn fails, the conversation is as it was before.
        Raises `PromptError` if the conversation no longer fits the context.
        """
        self._begun = self._interrupted = False
        asked = [*self.messages, Message("user", text)]
        prompt_ids = self._template.encode(asked)
        answer = self._start_answer(prompt_ids)
        sampling = self._sampling_of_this_turn()
        reason: Reason = "interrupted"
        try:
            for delta in self._deltas(prompt_ids, sampling, answer):
                yield TextDelta(delta)
            reason = answer.reason
        except KeyboardInterrupt:
            pass
        except GeneratorExit:
            self._remember(asked, answer)
            raise
        self._remember(asked, answer)
        yield Finished(reason, self.engine.stats, sampling.seed)

    def _start_answer(self, prompt_ids: Sequence[int]) -> _Answer:
        # A completion goes on in the middle of the prompt's text, so its spaces depend on it.
        context = prompt_ids if self._template.continues_prompt else ()
        return _Answer(Detokenizer(self._tokenizer, context), StopStrings(self._stop))

    def _sampling_of_this_turn(self) -> SamplingOptions:
        """A given seed moves on by one each turn: asked again, a question gets a new answer."""
        if self.sampling.seed is None:
            return self.sampling
        return dataclasses.replace(self.sampling, seed=(self.sampling.seed + self._turns) % 2**63)

    def _deltas(
        self, prompt_ids: Sequence[int], sampling: SamplingOptions, answer: _Answer
    ) -> Iterator[str]:
        stop_ids = self._template.stop_ids
        generated = self.engine.generate(
            prompt_ids, sampling=sampling, stop_ids=stop_ids, max_tokens=self.max_tokens
        )
        with closing(cast("Generator[int, None, None]", generated)) as ids:
            for token in ids:
                self._begun = True
                if token in stop_ids:
                    yield from answer.end("stop")
                    return
                yield from answer.add(token)
                if answer.cut or self._interrupted:
                    return
        full = self.max_tokens is None or len(answer.ids) < self.max_tokens
        yield from answer.end("context" if full else "length")

    def _remember(self, asked: list[Message], answer: _Answer) -> None:
        message = answer.message()
        if message is not None:
            self.messages = [*asked, message]
            self._turns += 1


class _Answer:
    """An answer as it grows: its ids, the text shown, and why it ended.

    The ids are what the next turn is built from. If the text was cut, they have to end where it
    does. With the stop string "\\n\\n" and the tokens `A` `.` `\\n` `\\nB` the text shown is `A.`,
    which ends where the second token does: keep two ids. With `A` `.\\n` `\\nB` no token ends
    there: keep the text alone, and the template will encode it.
    """

    def __init__(self, detokenizer: Detokenizer, stops: StopStrings) -> None:
        self.ids: list[int] = []
        self.text = ""
        self.reason: Reason = "interrupted"
        self.cut = False
        self._whole = False
        self._detokenizer = detokenizer
        self._stops = stops
        self._length = 0
        self._ends: list[int] = []

    def add(self, token: int) -> Iterator[str]:
        """Take the next id; yield the text to show, if there is some."""
        self.ids.append(token)
        self._ends.append(self._length)
        yield from self._show(self._detokenizer.add(token))

    def end(self, reason: Reason) -> Iterator[str]:
        """No more ids will come: yield what was held back."""
        self.reason = reason
        yield from self._show(self._detokenizer.flush())
        if not self.cut:
            self._whole = True
            if held := self._stops.flush():
                self.text += held
                yield held

    def message(self) -> Message | None:
        """What to remember, or None if nothing was said."""
        if self._whole:
            return Message("assistant", self.text, tuple(self.ids))
        if not self.text:
            return None
        return Message("assistant", self.text, self._ids_of_text())

    def _show(self, text: str) -> Iterator[str]:
        self._length += len(text)
        if self._ends:
            self._ends[-1] = self._length
        shown, stopped = self._stops.add(text)
        self.text += shown
        if stopped:
            self.reason, self.cut = "stop_string", True
        if shown:
            yield shown

    def _ids_of_text(self) -> tuple[int, ...] | None:
        count = bisect_left(self._ends, len(self.text)) + 1
        fits = count <= len(self._ends) and self._ends[count - 1] == len(self.text)
        return tuple(self.ids[:count]) if fits else None
