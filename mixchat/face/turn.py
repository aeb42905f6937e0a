"""The rounds of an answer whose calls of functions run, and the request of each."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mixchat.base.errors import UsageError
from mixchat.face.events import End, ToolResult
from mixchat.face.request import Request
from mixchat.face.tool_results import (
    MAX_RESULT,
    MAX_ROUNDS,
    STOPPED,
    ToolError,
    arguments_of,
    bounded_result,
)
from mixchat.text.messages import Message
from mixchat.text.tool_call import ToolCall

if TYPE_CHECKING:
    from mixchat.face.functions import PythonTool


class Turn:
    """The rounds of one answer.

    As long as the model calls functions, these run, and it answers again. After `max_rounds` such
    answers it is offered no more tools. A call of a tool without a function ends the answer.

    request: of the next round. read: returns the object that an answer writes. max_result: the
    characters of a function's result.
    """

    def __init__(
        self,
        request: Request,
        functions: Mapping[str, PythonTool] | None = None,
        max_rounds: int = MAX_ROUNDS,
        read: Callable[[str], Any] | None = None,
        max_result: int = MAX_RESULT,
    ) -> None:
        self.request = request
        self.read = read
        self.waiting: deque[ToolCall] = deque()  # calls without a result
        self.is_between = False  # a round has ended and the next one has not begun
        self.is_cancelled = False
        self._functions = functions or {}
        self._rounds_left = max_rounds
        self._max_result = max_result
        self._end: End | None = None  # of the last round
        self._added: list[Message] = []
        asked = request.messages
        # An answer repeats its beginning.
        self._asked = asked[:-1] if asked and asked[-1].role == "assistant" else asked

    def refuse_async(self) -> None:
        """Raise `UsageError` if a function is async, which only asyncio can run."""
        for name, function in self._functions.items():
            if function.is_async:
                raise UsageError(f"the tool {name} is async: ask with achat")

    def messages(self) -> list[Message]:
        """Return what the rounds so far add to the conversation. Each call has a result."""
        stopped = [Message("tool", STOPPED, call_id=call.id) for call in self.waiting]
        return [*self._added, *stopped]

    @property
    def end_between(self) -> End | None:
        """Return the end of a turn that was cancelled between two rounds."""
        if not (self.is_cancelled and self.is_between) or self._end is None:
            return None
        return replace(self._end, reason="interrupted")

    def continues_after(self, end: End) -> bool:
        """Note the end of a round. Return whether functions run and another round follows."""
        self._end = end
        if end.message is None:
            return False
        calls = end.message.calls
        if end.message.partial:  # a call that was cut off does not run
            self._added.append(replace(end.message, calls=()))
            return False
        self._added.append(end.message)
        if end.reason != "tool_calls" or any(call.name not in self._functions for call in calls):
            return False
        self.waiting.extend(calls)
        self.is_between = True
        return True

    def next_request(self) -> Request:
        """Return the request of the next round. Only the first one demands a call."""
        if self._end is not None:
            self._rounds_left -= 1
            self.request = self._follow_up(self._end)
        self.is_between = False
        return self.request

    def _follow_up(self, end: End) -> Request:
        offer = self.request.tools if self._rounds_left > 0 else None
        if offer is not None:
            offer = replace(offer, callable=offer.tools, must_call=False)
        messages = (*self._asked, *self._added)
        sampling: Any = self.request.sampling  # the last end's seed gives the same answer again
        sampling = replace(sampling, seed=end.seed)
        return replace(self.request, messages=messages, tools=offer, sampling=sampling)

    def with_result(self, text: str) -> ToolResult:
        """Note the result of the first call that waits, and return it as an event."""
        call = self.waiting.popleft()
        self._added.append(Message("tool", text, call_id=call.id))
        return ToolResult(call, text)

    def run(self, call: ToolCall) -> str:
        """Return the result of a call. An exception of the function is a result, too."""
        try:
            text = self._functions[call.name].call(arguments_of(call))
        except Exception as error:
            text = _in_words(error)
        return bounded_result(text, self._max_result)

    async def run_async(self, call: ToolCall) -> str:
        """Return the result of a call as `run` does. The event loop stays free."""
        try:
            text = await self._functions[call.name].call_async(arguments_of(call))
        except Exception as error:
            text = _in_words(error)
        return bounded_result(text, self._max_result)


def _in_words(error: Exception) -> str:
    """Return an exception as the model reads it, with its type unless it is ours."""
    words = f"{error}" if isinstance(error, ToolError) else f"{type(error).__name__}: {error}"
    return f"Error: {words}"
