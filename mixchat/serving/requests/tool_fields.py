"""The tools that a body offers, calls of tools, and their results."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, FailFast

from mixchat.face.request import Choice, ToolOffer
from mixchat.serving.requests.errors import RequestError, field_error
from mixchat.serving.requests.fields import RequestObject, max_items, read_object, wrong
from mixchat.text.messages import Message
from mixchat.text.tool_call import TOOL_NAME, TOOL_NAME_RULE, Tool, ToolCall, whole_arguments

MAX_TOOLS = 128
_MAX_CALLS = 128  # of a message
_IMAGES = ("input_image", "image")  # in OpenAI's responses and in Anthropic's API
_UNSEEN = {"type": "text", "text": "[an image, which this model cannot see]"}


def _valid_name(name: str) -> str:
    if not TOOL_NAME.fullmatch(name):
        raise wrong("invalid_value", TOOL_NAME_RULE)
    return name


def _of_an_object(schema: dict[str, Any] | None) -> dict[str, Any] | None:
    if schema is not None and schema.get("type", "object") != "object":
        raise wrong("invalid_value", 'has to be the schema of an object, of the type "object"')
    return schema


ToolName = Annotated[str, AfterValidator(_valid_name)]
Parameters = Annotated[dict[str, Any] | None, AfterValidator(_of_an_object)]


class OfferedFunction(RequestObject):
    """A function that a model may call, in OpenAI's form."""

    name: ToolName
    description: str | None = None
    parameters: Parameters = None
    strict: bool = False

    def tool(self) -> Tool:
        return Tool(self.name, self.description, self.parameters, self.strict)


class FunctionField(RequestObject):
    """One of the tools of a chat, for OpenAI and Ollama."""

    type: Literal["function"]
    function: OfferedFunction


FunctionFields = Annotated[list[FunctionField], FailFast(), max_items(MAX_TOOLS)]


def offered(fields: Sequence[FunctionField]) -> list[Tool]:
    """Return the tools of a chat's field."""
    return [field.function.tool() for field in fields]


def tool_offer(
    tools: Sequence[Tool],
    choice: Choice = "auto",
    only: str | None = None,
    *,
    parallel: bool = True,
    names: Sequence[str] = (),
    only_path: str = "tool_choice.function.name",
) -> ToolOffer | None:
    """Return the offer of a body, None if no tool may be called. Raises `RequestError`.

    only: the tool that has to be called, if one is named. names: the paths of the tools' names, if
    they are not OpenAI's.
    """
    known = set[str]()
    for number, tool in enumerate(tools):
        if tool.name in known:
            path = names[number] if names else f"tools[{number}].function.name"
            raise field_error(path, "is given twice", "invalid_value")
        known.add(tool.name)
    if not tools and (only is not None or choice == "required"):
        raise field_error("tool_choice", "needs tools", "invalid_value")
    if only is not None and only not in known:
        reason = f"names {only!a:.80}, which is not one of the tools"
        raise field_error(only_path, reason, "invalid_value")
    return ToolOffer.of(tools, choice, only, parallel=parallel)


def checked_name(name: str, path: str) -> str:
    """Return the name of a called function. Raises `RequestError`."""
    if not TOOL_NAME.fullmatch(name):
        raise field_error(path, TOOL_NAME_RULE, "invalid_value")
    return name


def checked_call(id: str, name: str, arguments: str, path: str) -> ToolCall:
    """Return a call. Raises `RequestError` if its arguments, the field at `path`, are no object.

    A client sends back what was cut off, with a result that says so. OpenAI takes any text there.
    """
    try:
        read_object(arguments.encode(), "the text")
        return ToolCall(id, name, arguments)
    except RequestError as error:
        fault = field_error(path, f"has to be a JSON object: {error}", "invalid_value")
    with suppress(RequestError, ValueError, RecursionError):
        whole = whole_arguments(arguments)
        read_object(whole.encode())
        return ToolCall(id, name, whole)
    raise fault


def check_results(messages: Sequence[Message], paths: Sequence[str]) -> None:
    """Check that the result of each call follows it, and that no call lacks one at the end.

    paths: the fields of the messages' calls, or of the ids in results. Raises `RequestError`.
    """
    waiting = set[str]()
    for message, path in zip(messages, paths, strict=True):
        if message.calls and message.role != "assistant":
            raise field_error(path, "belongs to the role assistant alone", "unknown_parameter")
        if message.call_id and message.role != "tool":
            raise field_error(path, "belongs to the role tool alone", "unknown_parameter")
        if len(message.calls) > _MAX_CALLS:
            raise field_error(path, f"has {len(message.calls)} calls; at most {_MAX_CALLS} fit")
        if message.role != "tool":
            waiting = {call.id for call in message.calls}
        elif not message.call_id:
            raise field_error(path, "is missing", "missing_required_parameter")
        elif message.call_id not in waiting:
            raise field_error(path, "names no call of the answer before", "invalid_value")
    if messages and messages[-1].calls:
        reason = "has calls without results, which have to follow it"
        raise field_error(paths[-1], reason, "invalid_value")


def readable(result: Any) -> Any:
    """Return a tool's result with a text in place of each image.

    An agent cannot take a result back, so a refusal would end its conversation.
    """
    if not isinstance(result, list):
        return result
    images = [isinstance(part, dict) and part.get("type") in _IMAGES for part in result]
    return [_UNSEEN if image else part for image, part in zip(images, result, strict=True)]
