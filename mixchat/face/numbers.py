"""The options of a request by their names, with limits: of Python's callers, flags and bodies."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from mixchat.base.errors import PromptError, UsageError
from mixchat.face.request import Request, ToolOffer
from mixchat.text.messages import Message
from mixchat.text.tool_call import Tool

if TYPE_CHECKING:
    from mixchat.base.options import RequestedSampling, SamplingOptions

    Sampling = TypeVar("Sampling", bound=SamplingOptions | RequestedSampling)


@dataclass(frozen=True)
class NumberParameter:
    """A number that controls sampling or a length. `field` is its name in Python."""

    field: str
    kind: Callable[[str], Any]
    fits: Callable[[Any], bool]
    limits: str

    def read(self, name: str, text: str) -> Any:
        """Return the value. Raises `UsageError` if it is not a number within the limits."""
        try:
            value = self.kind(text)
        except ValueError:
            raise UsageError(f"{name} has to be {self.limits}, not {text!r}") from None
        self.check(name, value)
        return value

    def check(self, name: str, value: Any) -> None:
        """Raise `UsageError` if the value is outside the limits, as NaN always is."""
        if not self.fits(value):
            raise UsageError(f"{name} has to be {self.limits}, not {value}")


SAMPLING = {
    "temp": NumberParameter("temperature", float, lambda x: 0 <= x < math.inf, "0 or more"),
    "top-p": NumberParameter("top_p", float, lambda x: 0 < x <= 1, "above 0 and at most 1"),
    "top-k": NumberParameter("top_k", int, lambda x: x >= 0, "0 or more"),
    "min-p": NumberParameter("min_p", float, lambda x: 0 <= x < 1, "at least 0 and below 1"),
    "repeat-penalty": NumberParameter(
        "repeat_penalty", float, lambda x: 0.01 <= x <= 100, "between 0.01 and 100"
    ),
    "seed": NumberParameter(
        "seed", int, lambda x: 0 <= x < 2**63, "between 0 and 9223372036854775807"
    ),
}
LENGTHS = {
    "max-tokens": NumberParameter(
        "max_tokens", int, lambda x: x >= 0, "1 or more, or 0 for what fits"
    ),
    "ctx-size": NumberParameter("ctx_size", int, lambda x: x >= 1, "1 or more"),
}


def request_of(
    advised: SamplingOptions,
    messages: Sequence[Message | Mapping[str, Any]] = (),
    **options: Any,
) -> Request:
    """Return a request with options by the names of `Request` and `SamplingOptions`.

    What is not given of the sampling is as `advised`. Tools are OpenAI's objects. Raises
    `UsageError` for an unknown option or a value outside its limits.
    """
    known = {number.field: (name, number) for name, number in (SAMPLING | LENGTHS).items()}
    fields = {field.name for field in dataclasses.fields(Request)}
    sampled = {field.name for field in dataclasses.fields(advised)}
    for name, value in options.items():
        if name not in fields | sampled:
            names = ", ".join(sorted((fields | sampled) - {"messages", "prompt", "sampling"}))
            raise UsageError(f"there is no option {name!r}", hint=f"The options are {names}.")
        if name in known and value is not None:
            label, number = known[name]
            number.check(label, value)
    numbers = {name: options.pop(name) for name in sampled & options.keys()}
    numbers = {name: value for name, value in numbers.items() if value is not None}
    if isinstance(options.get("stop"), str):
        options["stop"] = [options["stop"]]
    options["stop"] = tuple(options.get("stop") or ())
    if (tools := options.get("tools")) is not None and not isinstance(tools, ToolOffer):
        offered = tuple(_tool(tool) for tool in tools)
        options["tools"] = ToolOffer(offered, offered) if offered else None
    sampling = dataclasses.replace(options.pop("sampling", None) or advised, **numbers)
    return Request(tuple(map(_message, messages)), sampling=sampling, **options)


def _message(message: Message | Mapping[str, Any]) -> Message:
    if isinstance(message, Message):
        return message
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "user", "assistant", "tool") or not isinstance(content, str):
        raise PromptError("a message needs a role (system, user, assistant, tool) and its content")
    return Message(role, content, call_id=str(message.get("tool_call_id") or ""))


def _tool(tool: Tool | Mapping[str, Any]) -> Tool:
    if isinstance(tool, Tool):
        return tool
    function = tool.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UsageError('a tool is {"type": "function", "function": {"name": ..., ...}}')
    return Tool(function["name"], function.get("description"), function.get("parameters"))


def numbers_of(sampling: SamplingOptions | RequestedSampling) -> dict[str, Any]:
    """Return the numbers that a chat can change, by their names in Python."""
    return {number.field: getattr(sampling, number.field) for number in SAMPLING.values()}


def with_numbers(sampling: Sampling, numbers: Mapping[str, Any]) -> Sampling:
    """Return `sampling` with these numbers, by their names in Python. Bad ones are ignored."""
    known = {number.field: number for number in SAMPLING.values()}
    good = {
        field: value
        for field, value in numbers.items()
        if field in known and value is not None and known[field].fits(value)
    }
    for field in ("top_k", "seed"):
        if field in good:
            good[field] = int(good[field])
    return dataclasses.replace(sampling, **good)
