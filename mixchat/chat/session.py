"""A conversation with its messages and their token ids, and an answer as a stream of events."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias

from mixchat.base.context import Context
from mixchat.base.errors import MixchatError, PromptError, ServerError, UsageError
from mixchat.base.options import ChatOptions, accepted_numbers
from mixchat.chat.tools.toolbox import Toolbox, ToolStart
from mixchat.engine.stats import GenerationStats
from mixchat.face.events import End, Event, LeftOut, Piece, ToolResult
from mixchat.face.request import AnswerEvents, ChatModel, Request, ToolOffer
from mixchat.face.tool_results import MAX_ROUNDS, STOPPED
from mixchat.text.messages import Message

if TYPE_CHECKING:
    from mixchat.engine.generate import Engine
    from mixchat.face.reading_time import Predictor
    from mixchat.text.form.output_constraint import OutputConstraint
    from mixchat.text.template import Template
    from mixchat.text.tool_call import ToolCall

ChatEvent: TypeAlias = "Event | ToolStart"


class ModelProvider(Protocol):
    """The models of `mixchat run`, on this machine or a server."""

    @property
    def place(self) -> str:
        """Return the place as a chat names it, such as `on this machine`."""

    def choose(self, name: str | None, resumed: str | None, *, from_server: bool) -> str:
        """Return the named model, else the resumed chat's if it is there, else the usual one.

        from_server: a server had the resumed chat's model. Raises `ModelNotFoundError` if there is
        none.
        """

    def context_of(self, name: str) -> Context:
        """Return a model's context."""

    def prepare(self, name: str) -> bool:
        """Raise what is known before a model is loaded. Return whether loading takes long."""

    def open(
        self, name: str, least_context: Callable[[Template], int], *, shown: bool = True
    ) -> ChatModel:
        """Load a model, and show that if `shown`.

        Its context has room for so many tokens if memory allows.
        """

    def predictor(self, model: ChatModel, name: str) -> Predictor:
        """Return a function that predicts the speed of a loaded model."""

    def others(self, current: str) -> list[str]:
        """Return the names of the other models. It is called while a name is typed."""

    def check(self, name: str, current: str) -> None:
        """Raise `MixchatError` if a chat cannot change its model."""


class ChatSession:
    """One conversation with one model. The next turn remembers exactly the text that was shown.

    `history` has all questions and answers. `changed` and the values that come from options may be
    set between turns.
    """

    def __init__(
        self,
        model: ChatModel,
        options: ChatOptions,
        form: OutputConstraint | None = None,
        tools: Toolbox | None = None,
    ) -> None:
        self.model = model
        self.form = form
        self.tools = tools
        self._flags = accepted_numbers(options.sampling)
        self.changed: dict[str, int | float] = {}  # numbers of sampling since then, by name
        self.system = options.system
        self.max_tokens = options.max_tokens
        self.stop = options.stop
        self.overflow = options.overflow
        self.think = options.think
        self.history: list[Message] = []
        self._undone: list[list[Message]] = []  # what each `undo` since the last answer removed
        self._first = 0  # message of the history that is in the prompt
        self._turns = 0
        self._events: AnswerEvents | None = None  # of the answer that is computed
        self._stats = GenerationStats()
        self._has_token = self._interrupted = False

    @property
    def engine(self) -> Engine:
        """Return the engine. Raises `UsageError` if a server answers."""
        engine = self.model.engine
        if engine is None:
            raise UsageError("a server answers here, and does not tell of its experts")
        return engine

    @property
    def is_closed(self) -> bool:
        """Return whether the engine has given its memory back, and nothing can be asked."""
        engine = self.model.engine
        return engine is not None and engine.is_closed

    @property
    def context(self) -> Context | None:
        """Return the limit of prompt and answer together, None if a server does not tell."""
        return self.model.context

    @property
    def sampling(self) -> dict[str, int | float]:
        """Return the chosen numbers of sampling, by the names of `SamplingOptions`."""
        return self._flags | self.changed

    @property
    def stats(self) -> GenerationStats:
        """Return the counts and times of the last answer, as far as it has come."""
        return self._stats if self._events is None else self._events.stats

    @property
    def used_tokens(self) -> int | None:
        """Return how many tokens the conversation takes now, None if that is not known."""
        if not self.history:
            return 0
        return self.model.used_tokens([*self._system(), *self.history[self._first :]])

    def clear(self) -> None:
        """Forget everything but the system prompt."""
        self.restore([])

    def restore(self, history: Sequence[Message]) -> None:
        """Replace the history by these questions and answers."""
        self.history = list(history)
        self._first = 0
        self._undone = []
        self._turns = sum(message.role == "assistant" for message in history)

    def take_model(self, opened: ChatSession) -> None:
        """Continue with the model of another session, to its makers' advice.

        What was chosen of the sampling stays, and the seed. Answers of other weights keep their
        text, but not their token ids.
        """
        # Ids mean something else to another tokenizer, and its prompts have other lengths.
        if opened.model.identity != self.model.identity:
            self.history = _without_ids(self.history)
            self._undone = [_without_ids(messages) for messages in self._undone]
            self._first = 0
        self.model = opened.model

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
        if self._events is not None:
            self._events.cancel()
        return soon

    def ask(self, text: str) -> Iterator[ChatEvent]:
        """Send `text`, and yield the events of the answer, the last of them `End`.

        If the model calls tools, the answer has several messages, and the turn ends with the last.

        Of an answer that is cut short (`interrupt`, Ctrl-C, closing the iterator, a server that
        goes away) the part that was shown is remembered. If nothing was shown, or the turn fails,
        the conversation is unchanged. Raises `PromptError` if it does not fit the context.
        """
        return self._answer([*self.history, Message("user", text)])

    def ask_instead(self, text: str) -> Iterator[ChatEvent]:
        """Send `text` in place of the last question. Raises `PromptError` without one."""
        earlier = self.history[: self._last_question()]
        return self._answer([*earlier, Message("user", text)])

    def ask_again(self) -> Iterator[ChatEvent]:
        """Ask the last question again, to replace its answer. Raises `PromptError` without one."""
        return self._answer(self.history[: self._last_question() + 1])

    @property
    def shows_thinking(self) -> bool:
        return self.think in ("show", "on")

    def continue_answer(self) -> Iterator[ChatEvent]:
        """Continue the last answer. Raises `PromptError` without one."""
        self._last_question()
        if self.history[-1].role == "tool":  # the answer ended before the model saw the results
            return self._answer(list(self.history))
        return self._answer(self.history[:-1], self.history[-1])

    def _last_question(self) -> int:
        questions = [i for i, message in enumerate(self.history) if message.role == "user"]
        if not questions or questions[-1] == len(self.history) - 1:
            raise PromptError("nothing has been answered yet")
        return questions[-1]

    def _answer(self, asked: list[Message], answered: Message | None = None) -> Iterator[ChatEvent]:
        """Answer the last of the messages `asked`. `answered` is the answer that is continued.

        As long as the model calls tools, they run, and it answers again. After `MAX_ROUNDS` such
        answers it is offered no more tools.
        """
        earlier_history = self.history
        for calls_left in range(MAX_ROUNDS, -1, -1):
            try:
                end = yield from self._answer_once(asked, answered, offers_tools=calls_left > 0)
            except MixchatError as error:
                # Results that do not fit the context would spoil each question after this one.
                if calls_left < MAX_ROUNDS and not isinstance(error, ServerError):
                    self.history = earlier_history
                raise
            if end.reason != "tool_calls" or self.tools is None or not self.history[-1].calls:
                yield end
                return
            try:
                yield from self._run(self.tools, self.history[-1].calls)
            except KeyboardInterrupt:
                yield dataclasses.replace(end, reason="interrupted")
                return
            asked = list(self.history)
            answered = None
        yield end

    def _run(self, tools: Toolbox, calls: Sequence[ToolCall]) -> Iterator[ToolStart | ToolResult]:
        """Run the calls of the last answer, and remember their results."""
        self._has_token = False  # Ctrl-C ends a call at once
        texts = [STOPPED] * len(calls)
        most = 10**6 if self.context is None else self.context.tokens  # about a quarter of it
        try:
            for index, call in enumerate(calls):
                yield ToolStart(call)
                texts[index] = tools.run(call, most)
                yield ToolResult(call, texts[index])
        finally:
            self.history = [
                *self.history,
                *(
                    Message("tool", text, call_id=call.id)
                    for call, text in zip(calls, texts, strict=True)
                ),
            ]

    def _offer(self) -> ToolOffer | None:
        tools = () if self.tools is None else self.tools.tools
        return ToolOffer(tools, tools) if tools else None

    def _answer_once(
        self, asked: list[Message], answered: Message | None, *, offers_tools: bool
    ) -> Generator[Event, None, End]:
        self._has_token = self._interrupted = False
        if self.context is not None:
            self.context.check_text(asked[-1].content, "the question")
        first = min(self._first, len(asked) - 1)
        sampling = self.sampling
        if "seed" in sampling:  # So /regen gives a different answer.
            sampling["seed"] = (int(sampling["seed"]) + self._turns) % 2**63
        begun = [] if answered is None else [answered]
        request = Request(
            messages=(*self._system(), *asked[first:], *begun),
            sampling=sampling,
            max_tokens=self.max_tokens,
            stop=self.stop,
            overflow=self.overflow,
            think={"on": True, "off": False}.get(self.think),
            form=self.form,
            tools=self._offer() if offers_tools else None,
        )
        self._events = events = self.model.ask(request)
        end: End | None = None
        try:
            for event in events:
                if isinstance(event, End):
                    end = event
                    break
                self._has_token = self._has_token or isinstance(event, Piece)
                if isinstance(event, LeftOut):
                    first += event.messages
                    yield LeftOut.of(asked[:first])  # with those of earlier questions
                else:
                    yield event
        except KeyboardInterrupt:
            pass
        # SystemExit if the terminal was closed, ServerError if the server has gone
        except (GeneratorExit, SystemExit, ServerError):
            self._remember(events, asked, first)
            raise
        finally:
            # An answer that was left early has to end before the next question comes.
            events.close()
            self._events = None
            self._stats = events.stats if end is None else end.stats
        self._remember(events, asked, first)
        return end or End("interrupted", self._stats, message=events.message())

    def _remember(self, events: AnswerEvents, asked: Sequence[Message], first: int) -> None:
        message = events.message()
        if message is not None:
            if message.calls and message.partial:  # a call that was cut off does not run
                message = dataclasses.replace(message, calls=())
            self.history = [*asked, message]
            self._first = first
            self._undone = []
            self._turns += 1

    def _system(self) -> list[Message]:
        return [] if self.system is None else [Message("system", self.system)]


def _without_ids(messages: Sequence[Message]) -> list[Message]:
    return [dataclasses.replace(message, ids=None) for message in messages]
