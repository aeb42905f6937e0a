"""The body of a chat, turned into jobs.

| field                         | taken as                                           |
| ----------------------------- | -------------------------------------------------- |
| messages                      | system, developer, user, assistant, tool, as text  |
| messages[-1] of the assistant | the beginning of the answer                        |
| messages[].name               | ignored                                            |
| logprobs, top_logprobs        | at most 20                                         |
| messages[].reasoning_content  | ignored, except in an answer with tool_calls       |
| modalities                    | only ["text"]                                      |
| chat_template_kwargs,         | as far as the model's template knows them, else    |
| reasoning_effort, think       | ignored and named, or refused if strict            |
| tools, tool_choice,           | see tools.py                                       |
| parallel_tool_calls           |                                                    |
| functions, function_call      | ignored and named, or refused if they force a call |
| audio, and so on              | refused                                            |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import FailFast, Field, ValidationInfo, WrapValidator

from mixchat.serving.requests.chat_job import chat_job
from mixchat.serving.requests.errors import field_error, value_error
from mixchat.serving.requests.fields import RequestObject, max_items, number, only, wrong
from mixchat.serving.requests.options import (
    TOP_LOGPROBS,
    LoadedModel,
    ParsedRequest,
    SharedFields,
    parsed,
    read_fields,
)
from mixchat.serving.requests.tools import Calls, ToolFields, calls_of
from mixchat.text.messages import Message, Role
from mixchat.text.thinking import EFFORT, EFFORTS, SWITCHES, ThinkingFormat

MAX_MESSAGES = 10_000
MAX_PARTS = 1000  # of a message
_KWARGS, _OLLAMA = "chat_template_kwargs", "think"
_HIGHER_EFFORTS = ("xhigh", "max")  # than any that templates know
_NO_FUNCTIONS = "is not supported: use tools"
_NO_CALL = "cannot be followed: use tools and tool_choice"
_TEXT_ONLY = "is not supported: the model reads and writes text alone"
# An empty list counts as not given.
_ToolField: TypeAlias = Annotated[Any, only(([],), "unsupported_parameter", _NO_FUNCTIONS)]
_MediaField: TypeAlias = Annotated[Any, only(([],), "unsupported_parameter", _TEXT_ONLY)]
_ToolChoice: TypeAlias = Annotated[Any, only(("none", "auto"), "unsupported_value", _NO_CALL)]


class _Part(RequestObject):
    type: Literal["text"]
    text: str


def _text(given: Any, parts_of: Callable[[Any], list[_Part]], info: ValidationInfo) -> Any:
    if given is None and info.data.get("tool_calls"):
        return ""
    if isinstance(given, str):
        return given
    if not isinstance(given, list):
        raise wrong("invalid_value", "has to be a string or a list of parts")
    return "".join(part.text for part in parts_of(given))


class _ChatMessage(RequestObject):
    ignored = ("name", "reasoning")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    reasoning_content: Any = None
    tool_calls: Calls = Field([])
    tool_call_id: str = ""
    function_call: _ToolField = None
    audio: _MediaField = None
    refusal: _MediaField = None
    annotations: _MediaField = None
    # A string in the end, by `_text`.
    content: Annotated[list[_Part], FailFast(), max_items(MAX_PARTS), WrapValidator(_text)] = Field(
        None, validate_default=True
    )

    def message(self, path: str) -> Message:
        """Return the message. Raises `RequestError` for fields of another role."""
        role: Role = "system" if self.role == "developer" else self.role
        if self.tool_calls and role != "assistant":
            reason = "belongs to the role assistant alone"
            raise field_error(f"{path}.tool_calls", reason, "unknown_parameter")
        if role == "tool" and not self.tool_call_id:
            raise field_error(f"{path}.tool_call_id", "is missing", "missing_required_parameter")
        if self.tool_call_id and role != "tool":
            reason = "belongs to the role tool alone"
            raise field_error(f"{path}.tool_call_id", reason, "unknown_parameter")
        calls = calls_of(self.tool_calls, f"{path}.tool_calls")
        thinking = self.reasoning_content if calls else ""
        return Message(
            role,
            str(self.content),
            thinking=thinking if isinstance(thinking, str) else "",
            calls=calls,
            call_id=self.tool_call_id,
        )


class _ChatFields(ToolFields, SharedFields):
    functions: Any = None
    logprobs: bool = False
    top_logprobs: Annotated[int | None, number(TOP_LOGPROBS)] = None
    function_call: _ToolChoice = None
    audio: _MediaField = None
    web_search_options: _MediaField = None
    modalities: Annotated[Any, only((["text"],), "invalid_value", 'has to be ["text"]')] = None
    reasoning_effort: Annotated[
        Any, only(("none",), "invalid_value", 'has to be "none": the model does not reason apart')
    ] = None
    messages: Annotated[list[_ChatMessage], FailFast(), max_items(MAX_MESSAGES)] = Field([])


def read_chat(
    body: dict[str, Any], model: LoadedModel, unused: Sequence[str] = ()
) -> ParsedRequest:
    """Return the jobs of a body, which takes seconds for a long conversation.

    `unused` are fields of another API, which have no effect. Raises `RequestError` and
    `PromptError`.
    """
    body, variables = _take_thinking(body, model.service.template.thinking)
    fields, job, ignored = read_fields(_ChatFields, body, model, unused)
    ignored += ("functions",) if fields.functions not in (None, []) else ()
    if fields.top_logprobs and not fields.logprobs:
        raise field_error("top_logprobs", "needs logprobs: true", "invalid_value")
    if not fields.messages:
        raise field_error("messages", "is missing or empty", "missing_required_parameter")
    job = replace(job, top_logprobs=(fields.top_logprobs or 0) if fields.logprobs else None)
    messages = _messages(fields.messages)
    job = chat_job(job, model, messages, variables, fields.offer(), fields)
    return parsed(fields, job, [job.prompt_ids], ignored)


def _messages(fields: Sequence[_ChatMessage]) -> list[Message]:
    """Return the messages. Raises `RequestError` for a result of a tool without its call."""
    messages, waiting = list[Message](), set[str]()
    for i, given in enumerate(fields):
        message = given.message(f"messages[{i}]")
        if message.role == "tool" and message.call_id not in waiting:
            reason = "is not the id of a call in the answer before"
            raise field_error(f"messages[{i}].tool_call_id", reason, "invalid_value")
        if message.role != "tool":
            waiting = {call.id for call in message.calls}
        messages.append(message)
    if messages[-1].calls:
        reason = "have no results: a message of the role tool has to follow"
        raise field_error(f"messages[{len(messages) - 1}].tool_calls", reason, "invalid_value")
    return messages


def _take_thinking(
    body: dict[str, Any], format: ThinkingFormat | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a body without the fields that the model's template knows, and its variables.

    Only variables with a few known values are taken, since others could put control tokens into a
    prompt. Raises `RequestError` for a value of the wrong type.
    """
    if format is None:
        return body, {}
    rest = dict(body)
    variables = _from_fields(rest, format) | _from_kwargs(rest, format)
    for name, value in variables.items():
        if name in SWITCHES and not isinstance(value, bool):
            raise value_error(f"{_KWARGS}.{name}", "true or false", value)
        if name == EFFORT and value not in EFFORTS:
            raise value_error(f"{_KWARGS}.{name}", " or ".join(EFFORTS), value)
    return rest, variables


def _from_kwargs(rest: dict[str, Any], format: ThinkingFormat) -> dict[str, Any]:
    given = rest.get(_KWARGS)
    if not isinstance(given, dict):
        return {}
    variables = {name: given[name] for name in format.variables if name in given}
    rest[_KWARGS] = {name: value for name, value in given.items() if name not in variables}
    if not rest[_KWARGS]:
        del rest[_KWARGS]
    return variables


def _from_fields(rest: dict[str, Any], format: ThinkingFormat) -> dict[str, Any]:
    effort, switch, thinks = rest.get(EFFORT), format.switch, rest.get(_OLLAMA)
    effort = EFFORTS[-1] if effort in _HIGHER_EFFORTS else effort
    variables: dict[str, Any] = {}
    if switch is not None and isinstance(thinks, bool):
        variables[switch] = rest.pop(_OLLAMA)
    elif EFFORT in format.variables and thinks is True:
        del rest[_OLLAMA]  # a model with efforts always thinks
    if EFFORT in format.variables and effort in EFFORTS:
        del rest[EFFORT]
        variables[EFFORT] = effort
    elif switch is not None and effort == "none":
        del rest[EFFORT]
        variables[switch] = False
    return variables
