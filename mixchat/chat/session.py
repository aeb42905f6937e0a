"""A conversation with its messages and their token ids, and an answer as a stream of events."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mixchat.base.errors import PromptError, ServerError, UsageError
from mixchat.base.model_config import Context
from mixchat.base.options import ChatOptions
from mixchat.chat.answer import Reason
from mixchat.chat.backend import Backend, OnPrefill, Reply, Turn
from mixchat.text.messages import Message

if TYPE_CHECKING:
    from mixchat.base.options import RequestedSampling, SamplingOptions
    from mixchat.engine.generate import Engine
    from mixchat.engine.stats import GenerationStats


@dataclass(frozen=True)
class LeftOut:
    """The number of the oldest turns that are no longer in the prompt, because they do not fit."""

    turns: int


@dataclass(frozen=True)
class TextDelta:
    """The next piece of the answer."""

    text: str


@dataclass(frozen=True)
class ThinkingDelta:
    """The next piece of thinking before an answer, which may be empty, and its tokens so far."""

    text: str
    tokens: int


@dataclass(frozen=True)
class Finished:
    """The last event of an answer, with why it ended, its counts and times, and its seed.

    is_thinking: the answer had not begun yet.
    """

    reason: Reason
    stats: GenerationStats
    seed: int | None = None
    is_thinking: bool = False


Event = LeftOut | ThinkingDelta | TextDelta | Finished


def _ignore(done: int, total: int) -> None:
    """Leave the progress of the prefill unshown."""


class ChatSession:
    """One conversation with one backend. The next turn remembers exactly the text that was shown.

    `history` has all questions and answers. `sampling` and all that comes from the options may be
    changed between turns.
    """

    def __init__(
        self, backend: Backend, sampling: SamplingOptions | RequestedSampling, options: ChatOptions
    ) -> None:
        self.backend = backend
        self.sampling = self.advised = sampling  # `/set NAME none` returns to `advised`
        self.system, self.max_tokens = options.system, options.max_tokens
        self.stop, self.overflow, self.think = tuple(options.stop), options.overflow, options.think
        self.history: list[Message] = []
        self._undone: list[list[Message]] = []  # what each `undo` since the last answer removed
        self._first = 0  # message of the history that is in the prompt
        self._turns = 0
        self._has_token = self._interrupted = False

    @property
    def engine(self) -> Engine:
        """Return the engine. Raises `UsageError` if a server answers."""
        engine = self.backend.engine
        if engine is None:
            raise UsageError("a server answers here, and does not tell of its experts")
        return engine

    @property
    def is_closed(self) -> bool:
        """Return whether the engine has given its memory back, and nothing can be asked."""
        engine = self.backend.engine
        return engine is not None and engine.is_closed

    @property
    def context(self) -> Context | None:
        """Return the limit of prompt and answer together, None if a server does not tell."""
        return self.backend.context

    @property
    def stats(self) -> GenerationStats:
        """Return the counts and times of the last answer."""
        return self.backend.stats

    @property
    def used_tokens(self) -> int | None:
        """Return how many tokens the conversation takes now, None if that is not known."""
        if not self.history:
            return 0
        return self.backend.used_tokens([*self._system(), *self.history[self._first :]])

    def clear(self) -> None:
        """Forget everything but the system prompt."""
        self.restore([])

    def restore(self, history: Sequence[Message]) -> None:
        """Replace the history by these questions and answers."""
        self.history, self._first, self._undone = list(history), 0, []
        self._turns = sum(message.role == "assistant" for message in history)

    def take_model(self, other: ChatSession) -> None:
        """Continue with the model of another session, to its makers' advice.

        The seed stays, and what was changed of the sampling. Answers of other weights keep their
        text, but not their token ids.
        """
        advised = dataclasses.replace(other.advised, seed=self.advised.seed)
        changed = {
            name: value
            for name, value in vars(self.sampling).items()
            if value != getattr(self.advised, name)
        }
        if other.backend.identity != self.backend.identity:
            self.history = _without_ids(self.history)
            self._undone = [_without_ids(messages) for messages in self._undone]
            self._first = 0
        self.backend, self.advised = other.backend, advised
        self.sampling = dataclasses.replace(advised, **changed)

    def undo(self, turns: int = 1) -> None:
        """Remove the last questions and their answers. Until the next answer, `redo` restores them.

        Raises `PromptError` if there are not so many.
        """
        questions = [i for i, message in enumerate(self.history) if message.role == "user"]
        if not questions:
            raise PromptError("there is nothing to undo")
        if turns > len(questions):
            raise PromptError(f"this chat has fewer than {turns} turns: {len(questions)}")
        start = questions[-turns]
        self._undone.append(self.history[start:])
        del self.history[start:]
        if start <= self._first:
            self._first = 0  # what had been left out may fit again

    def redo(self) -> int:
        """Restore the turns that the last `undo` removed, and return how many those are."""
        messages = self._undone.pop() if self._undone else []
        self.history += messages
        return sum(message.role == "user" for message in messages)

    def interrupt(self) -> bool:
        """End the answer after its next token. A signal handler may call it.

        Returns False if that may take long, because there is no token yet or this is the second
        call. Then raise `KeyboardInterrupt`, which ends it at once.
        """
        soon = self._has_token and not self._interrupted
        self._interrupted = True
        return soon

    def ask(self, text: str, on_prefill: OnPrefill = _ignore) -> Iterator[Event]:
        """Send `text`, and yield the answer piece by piece, then `Finished`.

        Of an answer that is cut short (`interrupt`, Ctrl-C, closing the iterator, a server that
        goes away) the part that was shown is remembered. If nothing was shown, or the turn fails,
        the conversation is unchanged. Raises `PromptError` if it does not fit the context.
        """
        return self._answer([*self.history, Message("user", text)], on_prefill)

    def ask_instead(self, text: str, on_prefill: OnPrefill = _ignore) -> Iterator[Event]:
        """Send `text` in place of the last question. Raises `PromptError` without one."""
        before = self.history[: self._last_question()]
        return self._answer([*before, Message("user", text)], on_prefill)

    def ask_again(self, on_prefill: OnPrefill = _ignore) -> Iterator[Event]:
        """Ask the last question again, to replace its answer. Raises `PromptError` without one."""
        return self._answer(self.history[: self._last_question() + 1], on_prefill)

    def continue_answer(self, on_prefill: OnPrefill = _ignore) -> Iterator[Event]:
        """Continue the last answer. Raises `PromptError` without one."""
        question = self._last_question()
        return self._answer(self.history[: question + 1], on_prefill, self.history[question + 1])

    def _last_question(self) -> int:
        if len(self.history) < 2 or self.history[-1].role != "assistant":
            raise PromptError("nothing has been answered yet")
        return len(self.history) - 2

    def _answer(
        self, asked: list[Message], on_prefill: OnPrefill, before: Message | None = None
    ) -> Iterator[Event]:
        """Answer the last of the messages `asked`. `before` is the answer that is continued."""
        self._has_token = self._interrupted = False
        if self.context is not None:
            self.context.check_text(asked[-1].content, "the question")
        turn = self._turn(asked, before)
        reply = self.backend.reply(turn, on_prefill)
        reason: Reason = "interrupted"
        is_thinking = False

        def remember() -> None:
            message = reply.message()
            if message is not None:
                self.history, self._first = [*asked, message], reply.first
                self._undone = []
                self._turns += 1

        with closing(reply):
            if reply.first > self._first:
                yield LeftOut(sum(message.role == "user" for message in asked[: reply.first]))
            try:
                for delta in self._deltas(reply):
                    is_thinking = isinstance(delta, ThinkingDelta)
                    yield delta
                reason = reply.reason
            except KeyboardInterrupt:
                pass
            # SystemExit if the terminal was closed, ServerError if the server has gone
            except (GeneratorExit, SystemExit, ServerError):
                remember()
                raise
        remember()
        yield Finished(reason, self.stats, turn.sampling.seed, is_thinking)

    def _deltas(self, reply: Reply) -> Iterator[ThinkingDelta | TextDelta]:
        is_thinking = False
        for tokens, new in enumerate(reply.texts(), 1):
            self._has_token = True
            if new.thinking or (is_thinking and not new.text):
                yield ThinkingDelta(new.thinking, tokens)
            is_thinking = (is_thinking or new.thinking != "") and not new.text
            if new.text:
                yield TextDelta(new.text)
            if self._interrupted:
                return

    def _system(self) -> list[Message]:
        return [] if self.system is None else [Message("system", self.system)]

    def _turn(self, asked: list[Message], before: Message | None) -> Turn:
        return Turn(
            system=self._system(),
            messages=asked,
            first=min(self._first, len(asked) - 1),
            before=before,
            sampling=self._sampling_of_this_turn(),
            max_tokens=self.max_tokens,
            stop=self.stop,
            overflow=self.overflow,
            may_think=self.think != "off",
        )

    def _sampling_of_this_turn(self) -> SamplingOptions | RequestedSampling:
        """Return the options with a given seed raised by the turns so far.

        A question that is asked again gets another answer so.
        """
        if self.sampling.seed is None:
            return self.sampling
        return dataclasses.replace(self.sampling, seed=(self.sampling.seed + self._turns) % 2**63)


def _without_ids(messages: Sequence[Message]) -> list[Message]:
    return [dataclasses.replace(message, ids=None) for message in messages]
