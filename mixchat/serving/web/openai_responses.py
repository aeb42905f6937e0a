"""OpenAI's /v1/responses: its requests as chats, and its responses. Nothing is stored.

| field                                      | taken as                                         |
| ------------------------------------------ | ------------------------------------------------ |
| input, instructions                        | messages, calls and their results, and the       |
|                                            | reasoning before a call                          |
| max_output_tokens, temperature, top_p      | as in a chat                                     |
| tools, tool_choice, parallel_tool_calls    | as in a chat, only functions                     |
| text.format                                | response_format                                  |
| reasoning.effort                           | reasoning_effort                                 |
| previous_response_id, conversation,        | refused: answers are not stored                  |
| background                                 |                                                  |
| _LABELS                                    | ignored                                          |
| tools of other types, all others           | ignored and named, or refused if strict          |
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, FailFast, Field

from mixchat.serving.requests.chat import read_chat
from mixchat.serving.requests.errors import RequestError, field_error, value_error
from mixchat.serving.requests.fields import RequestObject, known_fields, only, validated
from mixchat.serving.requests.forms import schema_format
from mixchat.serving.requests.options import LoadedModel, ParsedRequest
from mixchat.serving.requests.tools import readable
from mixchat.serving.service import Done
from mixchat.serving.web.blocks import Block, BlockResponses, Change
from mixchat.serving.web.responses import JSON, to_event

_SAME = ("model", "temperature", "top_p", "stream", "parallel_tool_calls", "seed")
_LABELS = (
    *("include", "store", "truncation", "user", "metadata", "prompt_cache_key", "stream_options"),
    *("prompt_cache_retention", "safety_identifier", "service_tier", "client_metadata"),
    *("max_tool_calls", "top_logprobs"),
)
_TEXT_PARTS = ("input_text", "output_text", "text", "refusal")
_STATELESS = "is not supported: answers are not stored, so send the whole conversation"
_NONE = only((None, False), "unsupported_parameter", _STATELESS)


class _Format(RequestObject):
    ignored = ("name", "description")
    type: str
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool = False


class _Text(RequestObject):
    ignored = ("verbosity",)
    format: _Format | None = None


class _Reasoning(RequestObject):
    ignored = ("summary", "generate_summary", "context")
    effort: str | None = None


def _as_items(given: Any) -> Any:
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


class _Fields(RequestObject):
    ignored: ClassVar[tuple[str, ...]] = (*_SAME, *_LABELS)
    input: Annotated[list[dict[str, Any]], FailFast(), BeforeValidator(_as_items)]
    instructions: str = ""
    max_output_tokens: Any = None
    tools: Annotated[list[dict[str, Any]], FailFast()] = Field([])
    tool_choice: Any = None
    text: _Text = _Text()
    reasoning: _Reasoning = _Reasoning()
    previous_response_id: Annotated[Any, _NONE] = None
    conversation: Annotated[Any, _NONE] = None
    background: Annotated[Any, _NONE] = None


def read_responses(body: dict[str, Any], model: LoadedModel) -> ParsedRequest:
    """Return the job of a body. Raises as `read_chat` does."""
    body, unused = known_fields(_Fields, body)
    fields = validated(_Fields, body)
    kinds = [tool.get("type") for tool in fields.tools]
    unused += [f"tools[{i}].type" for i, kind in enumerate(kinds) if kind != "function"]
    return read_chat(_to_chat(fields, body), model, unused)


def _to_chat(fields: _Fields, body: dict[str, Any]) -> dict[str, Any]:
    chat: dict[str, Any] = {name: body[name] for name in _SAME if body.get(name) is not None}
    system = [{"role": "system", "content": fields.instructions}] if fields.instructions else []
    chat["messages"] = [*system, *_messages(fields.input)]
    if fields.max_output_tokens is not None:
        chat["max_tokens"] = fields.max_output_tokens
    if tools := [_tool(one) for one in fields.tools if one.get("type") == "function"]:
        chat["tools"] = tools
        if fields.tool_choice is not None:
            chat["tool_choice"] = _choice(fields.tool_choice)
    if fields.reasoning.effort is not None:
        chat["reasoning_effort"] = fields.reasoning.effort
    if (format := fields.text.format) is not None:
        chat["response_format"] = {"type": format.type}
        if format.type == "json_schema":
            chat["response_format"] = schema_format(format.schema_, strict=format.strict)
    return chat


def _choice(given: Any) -> Any:
    if isinstance(given, dict) and given.get("type") == "function":
        return {"type": "function", "function": {"name": given.get("name")}}
    return "auto" if isinstance(given, dict) else given


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {name: tool.get(name) for name in names}}


def _messages(given: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the messages of an input. Calls one after the other belong to one answer."""
    answer, thinking = dict[str, Any](), ""
    for i, item in enumerate(given):
        kind, path = item.get("type", "message"), f"input[{i}]"
        if kind == "item_reference":
            continue
        if kind == "reasoning":
            thinking += _thinking(item)
            continue
        if kind == "function_call":
            answer = answer or {"role": "assistant", "content": "", "tool_calls": []}
            function = {"name": item.get("name"), "arguments": item.get("arguments")}
            call = {"id": item.get("call_id"), "type": "function", "function": function}
            answer.setdefault("tool_calls", []).append(call)
            answer["reasoning_content"] = thinking
            continue
        if answer:
            yield answer
            answer = {}
        if kind == "function_call_output":
            content = _text(readable(item.get("output")), f"{path}.output")
            yield {"role": "tool", "tool_call_id": item.get("call_id"), "content": content}
            thinking = ""
        elif kind == "message":
            message = {"role": item.get("role"), "content": _text(item.get("content"), path)}
            if message["role"] == "assistant":
                answer = message
            else:
                thinking = ""
                yield message
        else:
            raise value_error(f"{path}.type", "message, function_call or its output", kind)
    if answer:
        yield answer


def _thinking(item: dict[str, Any]) -> str:
    parts = item.get("content")
    texts = [p.get("text") for p in parts if isinstance(p, dict)] if isinstance(parts, list) else []
    return "".join(text for text in texts if isinstance(text, str))


def _text(content: Any, path: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise field_error(path, "has to have a string or a list of parts", "invalid_value")
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") not in _TEXT_PARTS:
            raise field_error(path, "has a part that is no text", "unsupported_value")
        text = part.get("text", part.get("refusal"))
        if not isinstance(text, str):
            raise field_error(path, "has a part without a text", "invalid_value")
        texts.append(text)
    return "".join(texts)


class ResponsesResponses(BlockResponses):
    """The answers of /v1/responses."""

    def __init__(self, request: ParsedRequest, model: LoadedModel) -> None:
        super().__init__(request, model)
        self._number = -1
        self._ids: list[str] = []  # of blocks
        job = request.jobs[0]
        self._head = {
            "id": f"resp_{secrets.token_hex(12)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": self._model,
            "error": None,
            "instructions": None,
            "max_output_tokens": job.max_tokens,
            "metadata": {},
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": job.sampling.temperature,
            "top_p": job.sampling.top_p,
            "tool_choice": "auto",
            "tools": [],
            "truncation": "disabled",
        }

    def whole_answer(self, done: Done) -> JSON:
        return self._response(self._status(done), done)

    def beginning(self) -> bytes:
        response = self._response("in_progress", None)
        created = self._event("response.created", response=response)
        return created + self._event("response.in_progress", response=response)

    def last(self, done: Done) -> bytes:
        status = self._status(done)
        return self._event(f"response.{status}", response=self._response(status, done))

    def failure(self, error: RequestError) -> bytes:
        code = error.body["error"]["code"] or "server_error"
        response = self._response("failed", None)
        response["error"] = {"code": code, "message": str(error)}
        return self._event("response.failed", response=response)

    def _status(self, done: Done) -> str:
        return "incomplete" if done.reason in ("length", "context") else "completed"

    def _response(self, status: str, done: Done | None) -> JSON:
        reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
        output = [self._item(block, "completed") for block in self.blocks]
        usage = None if done is None else self._usage(done)
        rest = {"incomplete_details": reason, "output": output, "usage": usage}
        return {**self._head, "status": status, **rest}

    def _usage(self, done: Done) -> JSON:
        prompt, cached = self.prompt_counts([done])
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": cached},
            "output_tokens": done.generated_tokens,
            "output_tokens_details": {"reasoning_tokens": done.thinking_tokens},
            "total_tokens": prompt + done.generated_tokens,
        }

    def events(self, change: Change, block: Block, piece: str) -> Iterator[bytes]:
        place = {"item_id": self._id(block), "output_index": block.index}
        part = {**place, "content_index": 0}
        name = {
            "text": "response.output_text",
            "thinking": "response.reasoning_text",
            "call": "response.function_call_arguments",
        }[block.kind]
        inner = place if block.kind == "call" else part
        if block.kind == "text":
            inner = {**inner, "logprobs": []}
        if change == "add":
            yield self._event(f"{name}.delta", **inner, delta=piece)
        elif change == "open":
            item = self._item(block, "in_progress")
            yield self._event("response.output_item.added", output_index=block.index, item=item)
            if block.kind != "call":
                yield self._event("response.content_part.added", **part, part=_part(block))
        else:
            whole = "arguments" if block.kind == "call" else "text"
            yield self._event(f"{name}.done", **inner, **{whole: block.content})
            if block.kind != "call":
                yield self._event("response.content_part.done", **part, part=_part(block))
            item = self._item(block, "completed")
            yield self._event("response.output_item.done", output_index=block.index, item=item)

    def _item(self, block: Block, status: str) -> JSON:
        head = {"id": self._id(block), "status": status}
        if block.kind == "call":
            called = {"call_id": block.id, "name": block.name, "arguments": block.content}
            return {"type": "function_call", **head, **called}
        content = [_part(block)] if status == "completed" else []
        if block.kind == "thinking":
            return {"type": "reasoning", **head, "summary": [], "content": content}
        return {"type": "message", **head, "role": "assistant", "content": content}

    def _id(self, block: Block) -> str:
        while len(self._ids) <= block.index:
            self._ids.append(f"item_{secrets.token_hex(12)}")
        return self._ids[block.index]

    def _event(self, name: str, **fields: Any) -> bytes:
        self._number += 1
        return to_event({"type": name, "sequence_number": self._number, **fields}, name)


def _part(block: Block) -> JSON:
    if block.kind == "thinking":
        return {"type": "reasoning_text", "text": block.content}
    return {"type": "output_text", "text": block.content, "annotations": [], "logprobs": []}
