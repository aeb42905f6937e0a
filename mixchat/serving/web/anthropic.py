"""Anthropic's /v1/messages: its requests as OpenAI's chats, and its responses.

| field                                     | taken as                                     |
| ----------------------------------------- | -------------------------------------------- |
| messages, system                          | text, thinking, tool_use, tool_result blocks |
| max_tokens, temperature, top_p, top_k     | OpenAI's, or mixchat's                       |
| stop_sequences                            | stop                                         |
| tools, tool_choice                        | functions, with disable_parallel_tool_use    |
| thinking                                  | think, or reasoning_effort none              |
| output_config                             | reasoning_effort, response_format            |
| images, documents, tools of Anthropic     | refused, except images in a tool's result    |
| _LABELS, cache_control                    | ignored                                      |
| all others                                | ignored and named, or refused if strict      |
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, FailFast, Field

from mixchat.serving.requests.chat import MAX_MESSAGES, MAX_PARTS, read_chat
from mixchat.serving.requests.errors import RequestError, field_error
from mixchat.serving.requests.fields import RequestObject, known_fields, max_items, validated
from mixchat.serving.requests.forms import schema_format
from mixchat.serving.requests.options import LoadedModel, ParsedRequest
from mixchat.serving.requests.tools import call_object, readable
from mixchat.serving.service import Done
from mixchat.serving.web.blocks import Block, BlockResponses, Change
from mixchat.serving.web.responses import JSON, call_arguments, to_event
from mixchat.text.tool_call import ToolCall

PATH = "/v1/messages"
_LABELS = ("metadata", "service_tier", "container", "inference_geo", "cache_control")
_SAME = ("model", "max_tokens", "temperature", "top_p", "top_k", "stream")
_STOPS = {"tool_calls": "tool_use", "length": "max_tokens", "context": "max_tokens"}
_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
_KINDS |= {413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error"}


class _Block(RequestObject):
    ignored = ("cache_control", "citations", "signature", "caller")
    type: Literal["text", "thinking", "redacted_thinking", "tool_use", "tool_result"]
    text: str = ""
    thinking: str = ""
    data: str = ""
    id: str = ""
    name: str = ""
    input: dict[str, Any] = Field({})
    tool_use_id: str = ""
    content: Any = ""
    is_error: bool = False


def _as_blocks(given: Any) -> Any:
    return [{"type": "text", "text": given}] if isinstance(given, str) else given


_Blocks = Annotated[list[_Block], FailFast(), max_items(MAX_PARTS), BeforeValidator(_as_blocks)]


class _Message(RequestObject):
    role: Literal["user", "assistant", "system"]
    content: _Blocks


class _Result(RequestObject):
    content: _Blocks = Field([])


class _Tool(RequestObject):
    ignored = ("cache_control", "eager_input_streaming", "defer_loading", "allowed_callers")
    type: Literal["custom"] = "custom"
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool = False


class _Choice(RequestObject):
    type: Literal["auto", "any", "tool", "none"]
    name: str = ""
    disable_parallel_tool_use: bool = False


class _Thinking(RequestObject):
    ignored = ("budget_tokens", "display")
    type: Literal["enabled", "adaptive", "between_tools", "disabled"]


class _Schema(RequestObject):
    type: Literal["json_schema"]
    given: Annotated[dict[str, Any], Field(alias="schema")]


class _OutputConfig(RequestObject):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: _Schema | None = None


class _Fields(RequestObject):
    ignored: ClassVar[tuple[str, ...]] = (*_SAME, *_LABELS)
    messages: Annotated[list[_Message], FailFast(), max_items(MAX_MESSAGES)]
    system: _Blocks = Field([])
    stop_sequences: Annotated[list[str], FailFast()] = Field([])
    tools: Annotated[list[_Tool], FailFast()] = Field([])
    tool_choice: _Choice | None = None
    thinking: _Thinking | None = None
    output_config: _OutputConfig = _OutputConfig()


def read_messages(body: dict[str, Any], model: LoadedModel) -> ParsedRequest:
    """Return the job of a body. Raises as `read_chat` does."""
    if body.get("max_tokens") is None:
        raise field_error("max_tokens", "is missing", "missing_required_parameter")
    return read_counted(body, model)


def read_counted(body: dict[str, Any], model: LoadedModel) -> ParsedRequest:
    """Return the job of a body whose tokens are counted, which needs no `max_tokens`."""
    body, unused = known_fields(_Fields, body)
    return read_chat(_to_chat(body), model, unused)


def _to_chat(body: dict[str, Any]) -> dict[str, Any]:
    fields = validated(_Fields, body)
    chat: dict[str, Any] = {name: body[name] for name in _SAME if name in body}
    chat["messages"] = _merged([part for one in fields.messages for part in _messages(one)])
    if system := _text(fields.system):
        chat["messages"].insert(0, {"role": "system", "content": system})
    if fields.stop_sequences:
        chat["stop"] = fields.stop_sequences
    chat |= _thinking(fields)
    if (format := fields.output_config.format) is not None:
        chat["response_format"] = schema_format(format.given)
    if fields.tools:
        chat["tools"] = [_tool(tool) for tool in fields.tools]
    if (choice := fields.tool_choice) is not None:
        named: dict[str, Any] = {"type": "function", "function": {"name": choice.name}}
        kinds: dict[str, Any] = {"any": "required", "tool": named}
        chat["tool_choice"] = kinds.get(choice.type, choice.type)
        chat["parallel_tool_calls"] = not choice.disable_parallel_tool_use
    return chat


def _thinking(fields: _Fields) -> dict[str, Any]:
    thinking, effort = fields.thinking, fields.output_config.effort
    if thinking is not None and thinking.type == "disabled":
        return {"reasoning_effort": "none"}
    found: dict[str, Any] = {} if effort is None else {"reasoning_effort": effort}
    return found if thinking is None else {**found, "think": True}


def _tool(tool: _Tool) -> dict[str, Any]:
    function = tool.model_dump(include={"name", "description", "strict"})
    return {"type": "function", "function": {**function, "parameters": tool.input_schema}}


def _messages(message: _Message) -> Iterator[dict[str, Any]]:
    """Yield OpenAI's messages for one. The results of tools come first, each in a message."""
    blocks = message.content
    for block in blocks:
        if block.type == "tool_result":
            content = _text(validated(_Result, {"content": readable(block.content)}).content)
            yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": content}
    calls = [
        call_object(ToolCall(block.id, block.name, json.dumps(block.input)))
        for block in blocks
        if block.type == "tool_use"
    ]
    texts = [block for block in blocks if block.type == "text"]
    if calls or texts:
        thinking = "".join(block.thinking for block in blocks)
        more: dict[str, Any] = {"tool_calls": calls} if calls else {}
        more |= {"reasoning_content": thinking} if thinking else {}
        yield {"role": message.role, "content": _text(texts), **more}


def _merged(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages, with consecutive ones of a user joined.

    Templates want questions and answers in turns. An instruction in the midst of a conversation
    counts as a part of the question, so that the prompt before it stays cached.
    """
    merged, texts = list[dict[str, Any]](), list[list[str]]()  # texts: of each merged message
    for message in messages:
        role = "user" if message["role"] == "system" else message["role"]
        if role == "user" and merged and merged[-1]["role"] == "user":
            texts[-1].append(message["content"])
        else:
            merged.append({**message, "role": role})
            texts.append([message["content"]])
    return [
        {**message, "content": "\n\n".join(parts)}
        for message, parts in zip(merged, texts, strict=True)
    ]


def _text(blocks: Sequence[_Block]) -> str:
    return "\n\n".join(block.text for block in blocks)


class AnthropicResponses(BlockResponses):
    """The answers of /v1/messages."""

    def __init__(self, request: ParsedRequest, model: LoadedModel) -> None:
        super().__init__(request, model)
        self._head = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": self._model,
        }

    def whole_answer(self, done: Done) -> JSON:
        content = list(map(_content, self.blocks))
        return {**self._head, "content": content, **self._stop(done), "usage": self._usage([done])}

    def beginning(self) -> bytes:
        stop: JSON = {"stop_reason": None, "stop_sequence": None}
        message: JSON = {**self._head, "content": [], **stop, "usage": self._usage([])}
        return _event("message_start", message=message)

    def last(self, done: Done) -> bytes:
        return _event("message_delta", delta=self._stop(done), usage=self._usage([done]))

    def finish(self, done: Sequence[Done]) -> bytes:
        return _event("message_stop")

    def failure(self, error: RequestError) -> bytes:
        return to_event(error_body(error), "error")

    def comment(self, text: str) -> bytes:
        return _event("ping")

    def events(self, change: Change, block: Block, piece: str) -> Iterator[bytes]:
        if change == "open":
            yield _event("content_block_start", index=block.index, content_block=_content(block))
        elif change == "close":
            yield _event("content_block_stop", index=block.index)
        else:
            kinds = {
                "text": {"type": "text_delta", "text": piece},
                "thinking": {"type": "thinking_delta", "thinking": piece},
                "call": {"type": "input_json_delta", "partial_json": piece},
            }
            yield _event("content_block_delta", index=block.index, delta=kinds[block.kind])

    def _stop(self, done: Done) -> JSON:
        stops = self._request.jobs[0].stop
        if done.reason == "stop_string":
            known = stops[0] if len(stops) == 1 else None  # of several, nobody tells which
            return {"stop_reason": "stop_sequence", "stop_sequence": known}
        return {"stop_reason": _STOPS.get(done.reason, "end_turn"), "stop_sequence": None}

    def _usage(self, done: Sequence[Done]) -> JSON:
        prompt, cached = self.prompt_counts(done)
        return {
            "input_tokens": prompt - cached,
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": sum(one.generated_tokens for one in done),
        }


def error_body(error: RequestError) -> JSON:
    """Return an error in Anthropic's form."""
    usual = "api_error" if error.status >= 500 else "invalid_request_error"
    kind = _KINDS.get(error.status, usual)
    return {"type": "error", "error": {"type": kind, "message": str(error)}}


def _content(block: Block) -> JSON:
    if block.kind == "call":
        given = call_arguments(block.content)
        return {"type": "tool_use", "id": block.id, "name": block.name, "input": given or {}}
    if block.kind == "thinking":
        return {"type": "thinking", "thinking": block.content, "signature": ""}
    return {"type": "text", "text": block.content}


def _event(name: str, **fields: Any) -> bytes:
    return to_event({"type": name, **fields}, name)
