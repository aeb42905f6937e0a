"""Anthropic's /v1/messages: a body becomes a request, and the answer Anthropic's message.

| field                                     | taken as                                     |
| ----------------------------------------- | -------------------------------------------- |
| messages, system                          | text, thinking, tool_use, tool_result blocks |
| max_tokens, temperature, top_p, top_k     | as in a chat of OpenAI                       |
| stop_sequences                            | strings that end the answer                  |
| tools, tool_choice                        | functions, with disable_parallel_tool_use    |
| thinking, output_config.effort            | as far as the model's template knows them    |
| output_config.format                      | a JSON schema                                |
| images, documents, tools of Anthropic     | refused, except images in a tool's result    |
| _LABELS, cache_control                    | ignored                                      |
| all others                                | ignored and named, or refused if strict      |
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import FailFast, Field

from mixchat.face.events import End
from mixchat.face.request import Choice, Request
from mixchat.serving.requests import shared, tool_fields
from mixchat.serving.requests.errors import RequestError, field_error
from mixchat.serving.requests.fields import (
    JSON,
    RequestObject,
    as_part,
    max_items,
    or_text,
    read_known,
    validated,
)
from mixchat.serving.requests.shared import APIRequest
from mixchat.serving.web.blocks import AnswerBlock, BlockResponses, Change
from mixchat.serving.web.responses import call_arguments, to_event
from mixchat.text.messages import Message
from mixchat.text.tool_call import Tool, ToolCall

if TYPE_CHECKING:
    from mixchat.face.model import Model

PATH = "/v1/messages"
_LABELS = ("metadata", "service_tier", "container", "inference_geo", "cache_control")
_CHOICES: dict[str, Choice] = {"any": "required", "none": "none"}
_STOPS = {"tool_calls": "tool_use", "length": "max_tokens", "context": "max_tokens"}
_ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
_ERROR_TYPES |= {413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error"}


class _ContentBlock(RequestObject):
    ignored = ("cache_control", "citations", "signature", "caller")
    type: Literal["text", "thinking", "redacted_thinking", "tool_use", "tool_result"]
    text: str = ""
    thinking: str = ""
    data: str = ""
    id: str = ""
    name: str = ""
    input: JSON = Field({})
    tool_use_id: str = ""
    content: Any = ""
    is_error: bool = False


_ContentBlocks = Annotated[
    list[_ContentBlock], FailFast(), max_items(shared.MAX_PARTS), or_text(as_part)
]


class _AnthropicMessage(RequestObject):
    role: Literal["user", "assistant", "system"]
    content: _ContentBlocks


class _Result(RequestObject):
    content: _ContentBlocks = Field([])


class _CustomTool(RequestObject):
    ignored = ("cache_control", "eager_input_streaming", "defer_loading", "allowed_callers")
    type: Literal["custom"] = "custom"
    name: tool_fields.ToolName
    description: str | None = None
    input_schema: tool_fields.Parameters
    strict: bool = False


class _ToolChoice(RequestObject):
    type: Literal["auto", "any", "tool", "none"]
    name: str = ""
    disable_parallel_tool_use: bool = False


class _Thinking(RequestObject):
    ignored = ("budget_tokens", "display")
    type: Literal["enabled", "adaptive", "between_tools", "disabled"]


class _OutputFormat(RequestObject):
    type: Literal["json_schema"]
    schema_: Annotated[shared.Schema, Field(alias="schema")]


class _OutputConfig(RequestObject):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: _OutputFormat | None = None


class _MessagesFields(RequestObject):
    ignored: ClassVar[tuple[str, ...]] = ("model", *_LABELS)
    max_tokens: shared.Length = None
    messages: Annotated[list[_AnthropicMessage], FailFast(), max_items(shared.MAX_MESSAGES)]
    system: _ContentBlocks = Field([])
    temperature: Annotated[Any, shared.declared("temperature")] = None
    top_p: Annotated[Any, shared.declared("top_p")] = None
    top_k: Annotated[Any, shared.declared("top_k")] = None
    stop_sequences: shared.Stops = Field([])
    stream: bool = False
    tools: Annotated[list[_CustomTool], FailFast(), max_items(tool_fields.MAX_TOOLS)] = Field([])
    tool_choice: _ToolChoice = _ToolChoice(type="auto")
    thinking: _Thinking | None = None
    output_config: _OutputConfig = _OutputConfig()


def read_messages(body: JSON, model: Model, strict: bool, at_end: ExitStack) -> APIRequest:
    """Return the request of a body. Raises as `read_chat` does."""
    # Anthropic's API alone requires it.
    if body.get("max_tokens") is None:
        raise field_error("max_tokens", "is missing", "missing_required_parameter")
    return read_counted(body, model, strict, at_end)


def read_counted(body: JSON, model: Model, strict: bool, at_end: ExitStack) -> APIRequest:
    """Return the request of a body whose tokens are counted, which needs no `max_tokens`."""
    shared.check_model(body.get("model"), model.name)
    fields, unused = read_known(_MessagesFields, body)
    messages = _messages(fields)
    if not messages:
        raise field_error("messages", "is missing or empty", "missing_required_parameter")
    if system := _text(fields.system):
        messages.insert(0, Message("system", system))
    config = fields.output_config
    thinks = None
    effort: str | None = config.effort
    if fields.thinking is not None and fields.thinking.type == "disabled":
        effort = "none"
    elif fields.thinking is not None:
        thinks = True
    variables, used = shared.thinking_variables(model.template.thinking, thinks, effort)
    if thinks and "think" not in used:
        unused.append("thinking")
    if effort not in (None, "none") and "effort" not in used:
        unused.append("output_config.effort")
    choice = fields.tool_choice
    offer = tool_fields.tool_offer(
        [Tool(t.name, t.description, t.input_schema, t.strict) for t in fields.tools],
        _CHOICES.get(choice.type, "auto"),
        choice.name if choice.type == "tool" else None,
        parallel=not choice.disable_parallel_tool_use,
        names=[f"tools[{number}].name" for number in range(len(fields.tools))],
        only_path="tool_choice.name",
    )
    request = Request(
        messages,
        sampling=shared.sampling_of(model, fields),
        max_tokens=fields.max_tokens,
        stop=tuple(fields.stop_sequences),
        variables=variables,
        tools=offer,
        form=None if config.format is None else config.format.schema_,
    )
    return shared.api_request(
        model,
        [request],
        at_end,
        form_field="output_config.format",
        stream=fields.stream,
        ignored=shared.check_unused(unused, strict),
    )


def _messages(fields: _MessagesFields) -> list[Message]:
    """Return the messages of a body, with consecutive ones of a user joined.

    Templates want questions and answers in turns. An instruction in the midst of a conversation
    counts as a part of the question, so that the prompt before it stays cached. Raises
    `RequestError`.
    """
    messages = list[Message]()
    paths = list[str]()
    texts: list[list[str]] = []  # of each message, joined once at the end
    for number, field in enumerate(fields.messages):
        for message, path in _parts(field, f"messages[{number}].content"):
            if message.role == "user" and messages and messages[-1].role == "user":
                texts[-1].append(message.content)
            else:
                messages.append(message)
                paths.append(path)
                texts.append([message.content])
    tool_fields.check_results(messages, paths)
    return [
        replace(message, content="\n\n".join(parts))
        for message, parts in zip(messages, texts, strict=True)
    ]


def _parts(field: _AnthropicMessage, path: str) -> Iterator[tuple[Message, str]]:
    """Yield the messages of one, with their paths. The results of tools come first."""
    # In Anthropic's API a result is a block in a message of the user, before its text.
    calls = list[ToolCall]()
    for number, block in enumerate(field.content):
        if block.type == "tool_result":
            content = {"content": tool_fields.readable(block.content)}
            result = validated(_Result, content, f"{path}[{number}]")
            message = Message("tool", _text(result.content), call_id=block.tool_use_id)
            yield message, f"{path}[{number}].tool_use_id"
        elif block.type == "tool_use":
            name = tool_fields.checked_name(block.name, f"{path}[{number}].name")
            calls.append(ToolCall(block.id, name, json.dumps(block.input)))
    texts = [block for block in field.content if block.type == "text"]
    if calls or texts:
        thinking = "".join(block.thinking for block in field.content) if calls else ""
        role: Literal["assistant", "user"] = "assistant" if field.role == "assistant" else "user"
        yield Message(role, _text(texts), thinking=thinking, calls=tuple(calls)), path


def _text(blocks: Sequence[_ContentBlock]) -> str:
    return "\n\n".join(block.text for block in blocks)


class AnthropicResponses(BlockResponses):
    """The answers of /v1/messages."""

    def __init__(self, request: APIRequest, model: Model) -> None:
        super().__init__(request, model)
        self._head = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": self._model,
        }

    def whole_answer(self, end: End) -> JSON:
        # A call that the limit cut off would run with other arguments, or with none.
        whole = [block for block in self.blocks if block.kind != "call" or not block.is_cut_off]
        content = list(map(_content, whole))
        return {**self._head, "content": content, **self._stop(end), "usage": self._usage([end])}

    def beginning(self) -> bytes:
        stop: JSON = {"stop_reason": None, "stop_sequence": None}
        message: JSON = {**self._head, "content": [], **stop, "usage": self._usage([])}
        return _event("message_start", message=message)

    def last(self, end: End) -> bytes:
        return _event("message_delta", delta=self._stop(end), usage=self._usage([end]))

    def finish(self, ends: Sequence[End]) -> bytes:
        return _event("message_stop")

    def failure(self, error: RequestError) -> bytes:
        return to_event(error_body(error), "error")

    def comment(self, text: str) -> bytes:
        return _event("ping")  # Anthropic's own sign of life

    def events(self, change: Change, block: AnswerBlock, content: str) -> Iterator[bytes]:
        if change == "open":
            yield _event("content_block_start", index=block.index, content_block=_content(block))
        elif change == "close":
            yield _event("content_block_stop", index=block.index)
        else:
            deltas = {
                "text": {"type": "text_delta", "text": content},
                "thinking": {"type": "thinking_delta", "thinking": content},
                "call": {"type": "input_json_delta", "partial_json": content},
            }
            yield _event("content_block_delta", index=block.index, delta=deltas[block.kind])

    def _stop(self, end: End) -> JSON:
        stops = self._request.requests[0].stop
        if end.reason == "stop_string":
            known = stops[0] if len(stops) == 1 else None  # of several, nobody tells which
            return {"stop_reason": "stop_sequence", "stop_sequence": known}
        return {"stop_reason": _STOPS.get(end.reason, "end_turn"), "stop_sequence": None}

    def _usage(self, ends: Sequence[End]) -> JSON:
        prompt, cached = self.prompt_counts(ends)
        return {
            "input_tokens": prompt - cached,
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": sum(end.stats.generated_tokens for end in ends),
        }


def error_body(error: RequestError) -> JSON:
    """Return an error in Anthropic's form."""
    usual = "api_error" if error.status >= 500 else "invalid_request_error"
    error_type = _ERROR_TYPES.get(error.status, usual)
    return {"type": "error", "error": {"type": error_type, "message": str(error)}}


def _content(block: AnswerBlock) -> JSON:
    if block.kind == "call":
        arguments = call_arguments(block.content)
        return {"type": "tool_use", "id": block.id, "name": block.name, "input": arguments or {}}
    if block.kind == "thinking":
        # Clients send the block back with its signature, which Anthropic checks and this does not.
        return {"type": "thinking", "thinking": block.content, "signature": ""}
    return {"type": "text", "text": block.content}


def _event(name: str, **fields: Any) -> bytes:
    return to_event({"type": name, **fields}, name)
