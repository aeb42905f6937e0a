"""The tools that a request offers, and calls in its conversation, in OpenAI's form."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, FailFast, Field

from mixchat.serving.requests.body import read_object
from mixchat.serving.requests.errors import RequestError, field_error, value_error
from mixchat.serving.requests.fields import RequestObject, max_items, validated, wrong
from mixchat.text.tool_call import CallDelta, Tool, ToolCall

_MAX_TOOLS = 128
MAX_CALLS = 128  # of a message
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,128}")
_CHOICES = ("none", "auto", "required")
_IMAGES = ("input_image", "image")  # in OpenAI's responses and in Anthropic's API
_UNSEEN = {"type": "text", "text": "[an image, which this model cannot see]"}
_CHOICE = "none, auto, required, or a function with its name"


@dataclass(frozen=True)
class ToolOffer:
    """The tools that an answer may call. If it `must_call`, it calls one or more of `callable`."""

    tools: tuple[Tool, ...]
    callable: tuple[Tool, ...]
    must_call: bool = False
    parallel: bool = True


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise wrong("invalid_value", "has to be 1 to 128 of the characters a-z A-Z 0-9 _ . -")
    return name


def _of_an_object(schema: dict[str, Any] | None) -> dict[str, Any] | None:
    if schema is not None and schema.get("type", "object") != "object":
        raise wrong("invalid_value", 'has to be the schema of an object, of the type "object"')
    return schema


Name = Annotated[str, AfterValidator(_checked_name)]


class _Function(RequestObject):
    name: Name
    description: str | None = None
    parameters: Annotated[dict[str, Any] | None, AfterValidator(_of_an_object)] = None
    strict: bool = False


class ToolField(RequestObject):
    """One of the field tools."""

    type: Literal["function"]
    function: _Function


class _CalledFunction(RequestObject):
    name: Name
    arguments: str


class CallField(RequestObject):
    """One of a message's tool_calls."""

    ignored = ("index",)
    id: str
    type: Literal["function"] = "function"
    function: _CalledFunction


class _Named(RequestObject):
    name: str


class _FunctionChoice(RequestObject):
    type: Literal["function"]
    function: _Named


class _NamedChoice(RequestObject):
    tool_choice: _FunctionChoice


class ToolFields(RequestObject):
    """The fields that offer tools."""

    tools: Annotated[list[ToolField], FailFast(), max_items(_MAX_TOOLS)] = Field([])
    tool_choice: Any = "auto"
    parallel_tool_calls: bool = True

    def offer(self) -> ToolOffer | None:
        """Return the offer, None if no tool may be called. Raises `RequestError`."""
        tools, choice = self._tools(), self._choice()
        if not tools and choice not in ("none", "auto"):
            raise field_error("tool_choice", "needs tools", "invalid_value")
        if not tools or choice == "none":
            return None
        offer = ToolOffer(tools, tools, choice != "auto", self.parallel_tool_calls)
        if not isinstance(choice, _Named):
            return offer
        only = tuple(tool for tool in tools if tool.name == choice.name)
        if not only:
            reason = f"names {choice.name!a:.80}, which is not one of the tools"
            raise field_error("tool_choice.function.name", reason, "invalid_value")
        return replace(offer, callable=only)

    def _tools(self) -> tuple[Tool, ...]:
        names = [field.function.name for field in self.tools]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise field_error(f"tools[{i}].function.name", "is given twice", "invalid_value")
        return tuple(Tool(**field.function.model_dump()) for field in self.tools)

    def _choice(self) -> str | _Named:
        given = self.tool_choice
        if isinstance(given, dict):
            return validated(_NamedChoice, {"tool_choice": given}).tool_choice.function
        if not isinstance(given, str) or given not in _CHOICES:
            raise value_error("tool_choice", _CHOICE, given)
        return given


def readable(result: Any) -> Any:
    """Return a tool's result with a text in place of each image.

    An agent cannot take a result back, so a refusal would end its conversation.
    """
    if not isinstance(result, list):
        return result
    images = [isinstance(part, dict) and part.get("type") in _IMAGES for part in result]
    return [_UNSEEN if image else part for image, part in zip(images, result, strict=True)]


Calls = Annotated[list[CallField], FailFast(), max_items(MAX_CALLS)]


def call_object(call: ToolCall | CallDelta) -> dict[str, Any]:
    """Return a call as a message of OpenAI's has it."""
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def calls_of(fields: Sequence[CallField], path: str) -> tuple[ToolCall, ...]:
    """Return the calls in a message's field. Raises `RequestError`."""
    calls = []
    for i, field in enumerate(fields):
        place = f"{path}[{i}].function.arguments"
        try:
            read_object(field.function.arguments.encode(), "the text")
        except RequestError as error:
            raise field_error(place, f"has to be a JSON object: {error}", "invalid_value") from None
        calls.append(ToolCall(field.id, field.function.name, field.function.arguments))
    return tuple(calls)
