"""The answer to `Model.chat`, as its events, its text or its object, for a thread or asyncio."""

from __future__ import annotations

import asyncio
import queue
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from mixchat.base.errors import CutOffError, UsageError
from mixchat.face.events import End, Event, Failed, LeftOut, Piece, Reading
from mixchat.face.request import Request, shown_message
from mixchat.text.messages import Message

if TYPE_CHECKING:
    from mixchat.engine.stats import GenerationStats
    from mixchat.face.prompt import Prompt
    from mixchat.face.running_answer import RunningAnswer, Sink
    from mixchat.face.turn import Turn

_RoundEvent: TypeAlias = "LeftOut | Reading | Piece | End | Failed"
# Why an answer is not whole, by its reason.
_CUT_OFF = {
    "length": "it reached max_tokens, so raise that",
    "context": "the context is full",
    "stop_string": "it came to a stop string",
    "interrupted": "it was stopped",
    "tool_calls": "it calls tools and needs their results",
}


class AnsweringModel(Protocol):
    """The part of a model that answers use."""

    def check_process(self) -> None: ...

    def prompt(self, request: Request) -> Prompt: ...

    def submit(self, *answers: tuple[Request, Prompt, Sink]) -> list[RunningAnswer]: ...


class Round:
    """One answer of a model, whose sink gets the events. If nobody holds it any longer, it ends.

    Raises as `Model.submit` does, and `UsageError` in a forked process.
    """

    def __init__(self, model: AnsweringModel, request: Request, sink: Sink) -> None:
        model.check_process()
        prompt = model.prompt(request)
        (self._answer,) = model.submit((request, prompt, sink))
        self.cancel = weakref.finalize(self, self._answer.cancel)
        self._earlier = prompt.answered or Message("assistant", "")
        self._shown: list[Piece] = []
        self._end: End | Failed | None = None

    @property
    def stats(self) -> GenerationStats:
        return replace(self._answer.stats)

    def note(self, event: _RoundEvent) -> LeftOut | Reading | Piece | End:
        """Return an event after it was noted. Raises the error of a failed answer."""
        if isinstance(event, Piece):
            self._shown.append(event)
        elif isinstance(event, End | Failed):
            self._end = event
        if isinstance(event, Failed):
            raise event.error
        return event

    def message(self) -> Message | None:
        """Return the message to remember of what was noted so far."""
        if isinstance(self._end, End):
            return self._end.message
        shown = shown_message(self._earlier, self._shown)
        computed = self._answer.message()
        if shown is None or computed is None or shown.content != computed.content:
            return shown
        return computed if shown.thinking == computed.thinking else shown

    def text(self) -> str:
        """Return the text that was noted, without thinking."""
        return "".join(piece.text for piece in self._shown)

    def parsed(self, turn: Turn) -> Any:
        """Return the object that the answer writes. Raises as `ModelAnswer.parsed` does."""
        if turn.read is None:
            raise UsageError("parsed() needs a form: a class, such as pydantic's, or a JSON schema")
        assert isinstance(self._end, End)
        if self._end.reason != "stop":
            tokens = self._end.stats.generated_tokens
            why = _CUT_OFF[self._end.reason]
            raise CutOffError(f"the answer is not whole after {tokens} tokens: {why}")
        return turn.read("" if self._end.message is None else self._end.message.content)


class Answer:
    """An answer in one or more rounds. If nobody holds it any longer, it ends."""

    _round: Round | None = None

    def __init__(self, model: AnsweringModel, turn: Turn) -> None:
        self._model: AnsweringModel | None = model  # until the end, or it would be closed before
        self._turn = turn
        self._end: End | None = None
        self._failure: Exception | None = None
        self._reading = threading.Lock()

    @property
    def end(self) -> End | None:
        """Return the last event, with the reason and the counts, None before it was yielded."""
        return self._end

    def messages(self) -> list[Message]:
        """Return the messages of all rounds that have ended, for the next request.

        They are answers, and results of calls.
        """
        return self._turn.messages()

    def cancel(self) -> None:
        """End the answer soon. Any thread or signal handler may call it."""
        self._turn.is_cancelled = True
        if self._round is not None:
            self._round.cancel()

    @contextmanager
    def _one_reader(self) -> Iterator[None]:
        """Refuse a second reader. An error, such as Ctrl-C, ends the answer."""
        if not self._reading.acquire(blocking=False):
            hint = "Let one thread read it, and hand the events to the others."
            raise UsageError("another thread is reading this answer", hint=hint)
        try:
            yield
        except BaseException as error:
            self.cancel()
            if isinstance(error, Exception):  # nothing follows
                self._failure = error
                self._model = None
            raise
        finally:
            self._reading.release()

    def _noted(self, event: _RoundEvent) -> Event | None:
        """Return an event of the round, None if another round follows."""
        assert self._round is not None
        known = self._round.note(event)
        if not isinstance(known, End):
            return known
        if self._turn.continues_after(known):
            return None
        self._model = None
        self._end = known
        return known

    def _end_if_cancelled(self) -> None:
        """End a round that began while the answer was cancelled."""
        if self._turn.is_cancelled:
            self.cancel()

    def _whole_round(self) -> Round:
        """Return the last round of an answer that was read. Raises the error that ended it."""
        if self._failure is not None:
            raise self._failure
        if self._round is None:
            raise UsageError("the answer was closed before it began")
        return self._round

    def _cut_off(self) -> End | None:
        """Return the end if the answer was cancelled between two rounds."""
        self._end = self._turn.end_between
        if self._end is not None:
            self._model = None
        return self._end


class ModelAnswer(Answer):
    """The answer to `Model.chat`. Iterate over it for its events, the last of them `End`.

    If nobody holds it any longer, the answer ends. Raises `UsageError` for a second thread that
    reads it, and in a forked process.
    """

    def __init__(self, model: AnsweringModel, turn: Turn) -> None:
        super().__init__(model, turn)
        turn.refuse_async()
        self._events = queue.SimpleQueue[_RoundEvent]()
        self._round: Round = Round(model, turn.next_request(), self._events.put)

    @property
    def stats(self) -> GenerationStats:
        """Return the counts and seconds so far, of the last round."""
        return self._round.stats

    def text(self) -> str:
        """Wait for the end, and return the text of the answer without thinking.

        After calls of functions it is the text of the last answer. Raises `MixchatError` if the
        answer cannot be finished.
        """
        for _ in self:
            pass
        return self._whole_round().text()

    def parsed(self) -> Any:
        """Wait for the end, and return the object that the answer writes as JSON.

        It is of the type that was given as `form`. For a JSON schema it is what `json.loads` gives.
        Raises `CutOffError` if the answer ended before its JSON did, `UsageError` without such a
        form, and pydantic's `ValidationError` for a rule that no JSON schema can state.
        """
        for _ in self:
            pass
        return self._whole_round().parsed(self._turn)

    def message(self) -> Message | None:
        """Return the message to remember of what was yielded so far, None if it shows nothing."""
        return self._round.message()

    def close(self) -> None:
        """End the answer, if it has not ended."""
        self.cancel()

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        with self._one_reader():
            event = self._next()
        if event is None:
            raise StopIteration
        return event

    def _next(self) -> Event | None:
        turn = self._turn
        while self._model is not None:
            self._model.check_process()
            if (end := self._cut_off()) is not None:
                return end
            if turn.waiting:
                return turn.with_result(turn.run(turn.waiting[0]))
            if turn.is_between:
                self._round = Round(self._model, turn.next_request(), self._events.put)
                self._end_if_cancelled()
            event = self._noted(self._events.get())
            if event is not None:
                return event
        return None


class AsyncAnswer(Answer):
    """The answer to `Model.achat`, for one task of asyncio. It begins when it is read.

    Iterate over it for its events, the last of them `End`, or await its `text()` or `parsed()`. It
    ends if its task is cancelled, or if nobody holds it any longer. Events wait for a task that
    takes them slowly, at most one for each token of the answer.
    """

    def __init__(self, model: AnsweringModel, turn: Turn) -> None:
        super().__init__(model, turn)
        self._events = asyncio.Queue[_RoundEvent]()

    async def text(self) -> str:
        """Return the text of the answer as `ModelAnswer.text` does."""
        return (await self._whole()).text()

    async def parsed(self) -> Any:
        """Return the object that the answer writes as `ModelAnswer.parsed` does."""
        return (await self._whole()).parsed(self._turn)

    async def aclose(self) -> None:
        """End the answer, if it has not ended."""
        self.cancel()

    def __aiter__(self) -> AsyncAnswer:
        return self

    async def __anext__(self) -> Event:
        with self._one_reader():
            event = await self._next()
        if event is None:
            raise StopAsyncIteration
        return event

    async def _whole(self) -> Round:
        async for _ in self:
            pass
        return self._whole_round()

    async def _next(self) -> Event | None:
        turn = self._turn
        while self._model is not None:
            self._model.check_process()
            if (end := self._cut_off()) is not None:
                return end
            if turn.waiting:
                return turn.with_result(await turn.run_async(turn.waiting[0]))
            if self._round is None and turn.is_cancelled:
                return None
            if self._round is None or turn.is_between:
                # The tokenizer takes seconds for a long conversation.
                sink = partial(_hand_over, asyncio.get_running_loop(), self._events)
                request = turn.next_request()
                self._round = await asyncio.to_thread(Round, self._model, request, sink)
                self._end_if_cancelled()
            event = self._noted(await self._events.get())
            if event is not None:
                return event
        return None


def _hand_over(
    loop: asyncio.AbstractEventLoop, events: asyncio.Queue[_RoundEvent], event: _RoundEvent
) -> None:
    with suppress(RuntimeError):  # the loop was closed, so nobody waits
        loop.call_soon_threadsafe(events.put_nowait, event)
