"""A conversation: its messages with their token ids, and an answer as a stream of events."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import takewhile
from operator import eq
from typing import TYPE_CHECKING, Literal, cast

from mixchat.chat.answer import Answer, Reason
from mixchat.context import BYTES_PER_TOKEN, Context
from mixchat.errors import PromptError
from mixchat.text.detokenizer import Detokenizer
from mixchat.text.messages import Message
from mixchat.text.stop import StopStrings

if TYPE_CHECKING:
    from mixchat.engine.generate import Engine, GenerationStats, OnPrefill
    from mixchat.options import SamplingOptions
    from mixchat.text.template import Template
    from mixchat.text.tokenizer import Tokenizer

Overflow = Literal["stop", "drop-oldest"]
# Fractions of the context, as divisors. Old turns are left out where less room is left than the
# answer may need: --max-tokens, but at most 1/2, or 1/8 without it. Then they are left out until
# 1/4 is free, because all that stays has to be prefilled again, which should be rare.
_MOST, _LEAST, _ROOM = 2, 8, 4
_LONGEST = 4  # fraction of the context that an answer may take by default


@dataclass(frozen=True)
class LeftOut:
    """The oldest turns are no longer in the prompt, because they do not fit: how many in all."""

    turns: int


@dataclass(frozen=True)
class TextDelta:
    """The next piece of the answer."""

    text: str


@dataclass(frozen=True)
class Finished:
    """The last event of an answer: why it ended, its counts and times, and its seed."""

    reason: Reason
    stats: GenerationStats
    seed: int | None = None


Event = LeftOut | TextDelta | Finished


def _ignore(done: int, total: int) -> None:
    """Leave the progress of the prefill unshown."""


class ChatSession:
    """One conversation with one engine. The next turn remembers exactly the text that was shown.

    `history` has all questions and answers. `sampling`, `max_tokens`, `stop`, `system` and
    `overflow` may be changed between turns. `max_tokens` is the longest answer that is
    allowed, 0 for what fits, None for the default; `advised_tokens` is the advice of the model's
    makers.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        template: Template,
        *,
        system: str | None = None,
        sampling: SamplingOptions,
        max_tokens: int | None = None,
        advised_tokens: int | None = None,
        stop: Sequence[str] = (),
        overflow: Overflow = "stop",
    ) -> None:
        self.engine = engine
        self.sampling = self.advised = sampling  # `/set NAME none` returns to `advised`
        self.max_tokens, self._advised_tokens = max_tokens, advised_tokens
        self.stop = tuple(stop)
        self.system = system
        self.overflow = overflow
        self.history: list[Message] = []
        self._first = 0  # message of the history that is in the prompt
        self._tokenizer = tokenizer
        self._template = template
        self._turns = 0
        self._has_token = self._interrupted = False

    @property
    def context(self) -> Context:
        """Return what the engine can hold."""
        return Context(self.engine.context_size, self.engine.config.max_position_embeddings)

    @property
    def stats(self) -> GenerationStats:
        """Return the counts and times of the last answer."""
        return self.engine.stats

    @property
    def expert_bytes(self) -> int:
        """Return the bytes of memory that the model's experts take now."""
        return self.engine.expert_bytes

    @property
    def messages(self) -> list[Message]:
        """Return the system prompt and the history."""
        return [*self._system(), *self.history]

    @property
    def longest_answer(self) -> int | None:
        """Return how many tokens an answer may have; None for what fits into the context.

        A small model may never end by itself, so there is a limit by default.
        """
        limit = self.max_tokens
        if limit is None:
            limit = self._advised_tokens or self.engine.context_size // _LONGEST
        return limit or None

    @property
    def used_tokens(self) -> int:
        """Return how many tokens the conversation takes now, which may be more than fit."""
        if not self.history:
            return 0
        least = _tokens_at_least(self.history[self._first :])
        if least > self.engine.context_size:
            return least
        *before, last = self.history[self._first :]
        ids = self._template.encode([*self._system(), *before])
        return len(ids) + len(self._ids_of(last))

    def clear(self) -> None:
        """Forget everything but the system prompt."""
        self.restore([])

    def restore(self, history: Sequence[Message]) -> None:
        """Replace the history by these questions and answers."""
        self.history, self._first = list(history), 0
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
        if other.engine.identity != self.engine.identity:
            self.history = [dataclasses.replace(message, ids=None) for message in self.history]
            self._first = 0
        self.engine, self._tokenizer = other.engine, other._tokenizer
        self._template = other._template
        self.advised, self._advised_tokens = advised, other._advised_tokens
        self.sampling = dataclasses.replace(advised, **changed)

    def undo(self, turns: int = 1) -> int:
        """Remove the last questions and their answers; return how many questions that were."""
        questions = [i for i, message in enumerate(self.history) if message.role == "user"]
        taken = questions[-turns:]
        if taken:
            del self.history[taken[0] :]
            if taken[0] <= self._first:
                self._first = 0  # what had been left out may fit again
        return len(taken)

    def interrupt(self) -> bool:
        """End the answer after its next token. A signal handler may call it.

        Returns False if that may take long, because there is no token yet or this is the second
        call: then raise `KeyboardInterrupt`, which ends it at once.
        """
        soon = self._has_token and not self._interrupted
        self._interrupted = True
        return soon

    def ask(self, text: str, on_prefill: OnPrefill = _ignore) -> Iterator[Event]:
        """Send `text`; yield the answer piece by piece, then `Finished`.

        `on_prefill` is called before the prompt is processed, with 0 and its tokens, and meanwhile,
        as in `Engine.generate`.

        Of an answer that is cut short (`interrupt`, Ctrl-C, closing the iterator) the part that was
        shown is remembered. If nothing was shown, or the turn fails, the conversation is unchanged.
        Raises `PromptError` in place of the first event where the conversation does not fit the
        context and `overflow` lets no turns be left out.
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
        """Answer the last of the messages `asked`; `before` is the answer that is continued."""
        self._has_token = self._interrupted = False
        self.context.check_text(asked[-1].content, "the question")
        start = [] if before is None else self._ids_of(before)
        prompt_ids, first = self._fitted(asked, start)
        if len(prompt_ids) >= self.context.tokens:
            raise self._too_long(asked[first:], start, len(prompt_ids))
        if first > self._first:
            yield LeftOut(sum(message.role == "user" for message in asked[:first]))
        answer = self._start_answer(prompt_ids, before)
        sampling = self._sampling_of_this_turn()
        reason: Reason = "interrupted"

        def remember() -> None:
            message = answer.message(before)
            if message is not None:
                self.history, self._first = [*asked, message], first
                self._turns += 1

        try:
            for delta in self._deltas(prompt_ids, sampling, answer, on_prefill):
                yield TextDelta(delta)
            reason = answer.reason
        except KeyboardInterrupt:
            pass
        except (GeneratorExit, SystemExit):  # SystemExit: the terminal was closed
            remember()
            raise
        remember()
        yield Finished(reason, self.stats, sampling.seed)

    def _system(self) -> list[Message]:
        return [] if self.system is None else [Message("system", self.system)]

    def _ids_of(self, answer: Message) -> Sequence[int]:
        return self._tokenizer.encode(answer.content) if answer.ids is None else answer.ids

    def _fitted(self, asked: Sequence[Message], start: Sequence[int]) -> tuple[list[int], int]:
        """Return the prompt's ids, with the `start` of an answer behind them, and the number of the
        first message of `asked` that is in it."""
        first, size = min(self._first, len(asked) - 1), self.engine.context_size
        later = [i for i, message in enumerate(asked) if i > first and message.role == "user"]
        while (known := _tokens_at_least(asked[first:])) > size:  # it need not be encoded
            if self.overflow == "stop" or not later:
                raise self._too_long(asked[first:], start, known)
            first = later.pop(0)
        whole = [*self._template.encode([*self._system(), *asked[first:]]), *start]
        least = min(self.max_tokens, size // _MOST) if self.max_tokens else size // _LEAST
        room = max(least, size // _ROOM)
        if self.overflow == "stop" or len(whole) + max(least, 1) <= size:
            return whole, first
        for at in later:
            ids = [*self._template.encode([*self._system(), *asked[at:]]), *start]
            if len(ids) + room <= size or (at == later[-1] and len(ids) < size):
                return ids, at
        return whole, first  # not even the last question fits

    def _too_long(self, asked: Sequence[Message], start: Sequence[int], tokens: int) -> PromptError:
        """Return the error for a prompt that does not fit; its hint says if old turns could go."""
        error = self.context.prompt_too_long(tokens)
        if len(asked) == 1:
            return error
        alone = [*self._template.encode([*self._system(), asked[-1]]), *start]
        if len(alone) < self.context.tokens:
            error.hint = (
                "The oldest turns can be left out: --overflow drop-oldest, or in a chat /set "
                f"overflow drop-oldest; /clear starts a new chat. {error.hint}"
            )
        return error

    def _start_answer(self, prompt_ids: Sequence[int], before: Message | None) -> Answer:
        # A completion, or an answer that is continued, starts in the middle of a text: its spaces
        # depend on what comes before.
        context: Sequence[int] = ()
        if self._template.continues_prompt:
            context = prompt_ids
        elif before is not None:
            context = self._ids_of(before)
        return Answer(Detokenizer(self._tokenizer, context), StopStrings(self.stop))

    def _sampling_of_this_turn(self) -> SamplingOptions:
        """Return the options with a given seed raised by the turns so far.

        A question that is asked again gets another answer so.
        """
        if self.sampling.seed is None:
            return self.sampling
        return dataclasses.replace(self.sampling, seed=(self.sampling.seed + self._turns) % 2**63)

    def _unread(self, prompt_ids: Sequence[int]) -> int:
        """Return how many tokens of a prompt the engine has to process."""
        held, _ = self.engine.held()
        same = sum(1 for _ in takewhile(bool, map(eq, held, prompt_ids)))
        return max(len(prompt_ids) - same, 1)

    def _deltas(
        self,
        prompt_ids: Sequence[int],
        sampling: SamplingOptions,
        answer: Answer,
        on_prefill: OnPrefill,
    ) -> Iterator[str]:
        stop_ids, limit = self._template.stop_ids, self.longest_answer
        on_prefill(0, self._unread(prompt_ids))
        generated = self.engine.generate(
            prompt_ids,
            sampling=sampling,
            stop_ids=stop_ids,
            max_tokens=limit,
            on_prefill=on_prefill,
        )
        with closing(cast("Generator[int, None, None]", generated)) as ids:
            for token in ids:
                self._has_token = True
                if token in stop_ids:
                    yield from answer.end("stop")
                    return
                yield from answer.add(token)
                if answer.cut or self._interrupted:
                    return
        full = limit is None or len(answer.ids) < limit
        yield from answer.end("context" if full else "length")


def _tokens_at_least(messages: Sequence[Message]) -> int:
    """Return how many tokens these have at least, without encoding them."""
    return sum(
        len(message.content) // BYTES_PER_TOKEN if message.ids is None else len(message.ids)
        for message in messages
    )
