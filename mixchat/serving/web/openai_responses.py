"""OpenAI's /v1/responses: a body becomes a request, and the answer a response. Nothing is stored.

| field                                      | taken as                                         |
| ------------------------------------------ | ------------------------------------------------ |
| input, instructions                        | messages, calls and their results, and the       |
|                                            | reasoning before a call                          |
| max_output_tokens, temperature, top_p      | as in a chat                                     |
| tools, tool_choice, parallel_tool_calls    | as in a chat, only functions                     |
| text.format                                | a JSON schema                                    |
| reasoning.effort                           | as far as the model's template knows it          |
| previous_response_id, conversation,        | refused: answers are not stored                  |
| background                                 |                                                  |
| _LABELS                                    | ignored                                          |
| tools of other types, all others           | ignored and named, or refused if strict          |
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AliasChoices, BeforeValidator, ConfigDict, FailFast, Field

from mixchat.face.events import COMPLETE, End
from mixchat.face.request import Request, ToolOffer
from mixchat.serving.requests import shared, tool_fields
from mixchat.serving.requests.errors import RequestError, field_error, value_error
from mixchat.serving.requests.fields import (
    JSON,
    RequestObject,
    as_part,
    max_items,
    only,
    or_text,
    read_known,
    validated,
)
from mixchat.serving.requests.shared import APIRequest
from mixchat.serving.web.blocks import AnswerBlock, BlockResponses, Change
from mixchat.serving.web.responses import to_event
from mixchat.text.messages import Message, Role

if TYPE_CHECKING:
    from mixchat.face.model import Model

_LABELS = (
    *("include", "store", "truncation", "user", "metadata", "prompt_cache_key", "stream_options"),
    *("prompt_cache_retention", "safety_identifier", "service_tier", "client_metadata"),
    *("max_tool_calls", "top_logprobs"),
)
_CHOICE = "none, auto, required, or a function with its name"
_STATELESS = "is not supported: answers are not stored, so send the whole conversation"
_NONE = only((None, False), "unsupported_parameter", _STATELESS)


class _Item(RequestObject):
    """An item of an input. Clients send answers' items back with fields that say nothing here."""

    model_config = ConfigDict(strict=True, extra="ignore")


class _Part(_Item):
    type: Literal["input_text", "output_text", "text", "refusal"]
    text: Annotated[str, Field(validation_alias=AliasChoices("text", "refusal"))]


_Parts = Annotated[list[_Part], FailFast(), max_items(shared.MAX_PARTS), or_text(as_part)]


class _MessageItem(_Item):
    role: Literal["system", "developer", "user", "assistant"]
    content: _Parts


class _CallItem(_Item):
    call_id: str
    name: tool_fields.ToolName
    arguments: str


class _ResultItem(_Item):
    call_id: str
    output: Annotated[_Parts, BeforeValidator(tool_fields.readable)]


class _TextFormat(RequestObject):
    ignored = ("name", "description")
    type: Literal["text", "json_object", "json_schema"]
    schema_: Annotated[shared.Schema | None, Field(alias="schema")] = None
    strict: bool = False  # every schema is followed to the letter


class _TextConfig(RequestObject):
    ignored = ("verbosity",)
    format: _TextFormat = _TextFormat(type="text")


class _Reasoning(RequestObject):
    ignored = ("summary", "generate_summary", "context")
    effort: str | None = None


class _FunctionTool(tool_fields.OfferedFunction):
    model_config = ConfigDict(strict=True, extra="ignore")


class _FunctionChoice(RequestObject):
    type: Literal["function"]
    name: str


class _ResponsesFields(RequestObject):
    ignored: ClassVar[tuple[str, ...]] = ("model", *_LABELS)
    input: Annotated[
        list[JSON],
        FailFast(),
        max_items(shared.MAX_MESSAGES),
        or_text(lambda text: {"role": "user", "content": text}),
    ]
    instructions: str = ""
    max_output_tokens: shared.Length = None
    temperature: Annotated[Any, shared.declared("temperature")] = None
    top_p: Annotated[Any, shared.declared("top_p")] = None
    seed: Annotated[Any, shared.declared("seed")] = None
    stream: bool = False
    tools: Annotated[list[JSON], FailFast(), max_items(tool_fields.MAX_TOOLS)] = Field([])
    tool_choice: Any = "auto"
    parallel_tool_calls: bool = True
    text: _TextConfig = _TextConfig()
    reasoning: _Reasoning = _Reasoning()
    previous_response_id: Annotated[Any, _NONE] = None
    conversation: Annotated[Any, _NONE] = None
    background: Annotated[Any, _NONE] = None


def read_responses(body: JSON, model: Model, strict: bool, at_end: ExitStack) -> APIRequest:
    """Return the request of a body. Raises as `read_chat` does."""
    shared.check_model(body.get("model"), model.name)
    fields, unused = read_known(_ResponsesFields, body)
    messages = _messages(fields.input)
    if not messages:
        raise field_error("input", "is missing or empty", "missing_required_parameter")
    if fields.instructions:
        messages.insert(0, Message("system", fields.instructions))
    effort = fields.reasoning.effort
    variables, used = shared.thinking_variables(model.template.thinking, None, effort)
    if effort not in (None, "none") and not used:
        unused.append("reasoning.effort")
    offer = _offer(fields, unused)
    format = fields.text.format
    form = format.schema_
    if format.type == "text" and form is not None:
        raise field_error("text.format.schema", "belongs to the types json_schema and json_object")
    if format.type == "json_schema" and form is None:
        raise field_error("text.format.schema", "is missing", "missing_required_parameter")
    if format.type == "json_object" and form is None:
        form = {"type": "object"}
    request = Request(
        messages,
        sampling=shared.sampling_of(model, fields),
        max_tokens=fields.max_output_tokens,
        variables=variables,
        tools=offer,
        form=form,
    )
    return shared.api_request(
        model,
        [request],
        at_end,
        form_field="text.format",
        stream=fields.stream,
        ignored=shared.check_unused(unused, strict),
    )


def _offer(fields: _ResponsesFields, unused: list[str]) -> ToolOffer | None:
    """Return the offer of the functions among the tools. Tools of other types are `unused`."""
    functions: dict[str, tool_fields.OfferedFunction] = {}  # by their paths
    for number, tool in enumerate(fields.tools):
        if tool.get("type") == "function":
            functions[f"tools[{number}]"] = validated(_FunctionTool, tool, f"tools[{number}]")
        else:
            unused.append(f"tools[{number}].type")
    choice = fields.tool_choice
    function = None
    if isinstance(choice, dict) and choice.get("type") == "function":
        function = validated(_FunctionChoice, choice, "tool_choice").name
    elif isinstance(choice, dict):
        choice = "auto"  # it names a tool that runs at OpenAI, such as web_search
    elif choice not in ("none", "auto", "required"):
        raise value_error("tool_choice", _CHOICE, choice)
    if not functions:  # a choice among tools of other types has no effect
        return None
    return tool_fields.tool_offer(
        [each.tool() for each in functions.values()],
        choice,
        function,
        parallel=fields.parallel_tool_calls,
        names=[f"{path}.name" for path in functions],
        only_path="tool_choice.name",
    )


def _messages(items: Sequence[JSON]) -> list[Message]:
    """Return the messages of an input. Calls one after the other belong to one answer.

    Reasoning is of the next call, unless a question or a result comes between. Raises
    `RequestError`.
    """
    messages = list[Message]()
    paths = list[str]()
    thinking = ""
    is_answer = False  # whether calls belong to the last message
    for number, fields in enumerate(items):
        item_type = fields.get("type", "message")
        path = f"input[{number}]"
        # References are to items that a server has stored.
        if item_type == "item_reference":
            continue
        if item_type == "reasoning":
            thinking += _thinking(fields)
            continue
        if item_type == "function_call":
            item = validated(_CallItem, fields, path)
            call = tool_fields.checked_call(
                item.call_id, item.name, item.arguments, f"{path}.arguments"
            )
            if not is_answer:
                messages.append(Message("assistant", ""))
                paths.append(path)
            calls = (*messages[-1].calls, call)
            messages[-1] = replace(messages[-1], thinking=thinking, calls=calls)
            is_answer = True
            continue
        is_answer = False
        if item_type == "function_call_output":
            result = validated(_ResultItem, fields, path)
            messages.append(Message("tool", _text(result.output), call_id=result.call_id))
            path = f"{path}.call_id"
            thinking = ""
        elif item_type == "message":
            message = validated(_MessageItem, fields, path)
            role: Role = "system" if message.role == "developer" else message.role
            messages.append(Message(role, _text(message.content)))
            is_answer = role == "assistant"
            thinking = thinking if is_answer else ""
        else:
            raise value_error(f"{path}.type", "message, function_call or its output", item_type)
        paths.append(path)
    tool_fields.check_results(messages, paths)
    return messages


def _thinking(item: JSON) -> str:
    parts = item.get("content")
    texts = [p.get("text") for p in parts if isinstance(p, dict)] if isinstance(parts, list) else []
    return "".join(text for text in texts if isinstance(text, str))


def _text(parts: Sequence[_Part]) -> str:
    return "".join(part.text for part in parts)


class ResponsesResponses(BlockResponses):
    """The answers of /v1/responses."""

    def __init__(self, request: APIRequest, model: Model) -> None:
        super().__init__(request, model)
        self._number = -1
        self._ids: list[str] = []  # of blocks
        sampling = request.sampling
        self._head = {
            "id": f"resp_{secrets.token_hex(12)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": self._model,
            "error": None,
            "instructions": None,
            "max_output_tokens": model.longest_answer(request.requests[0].max_tokens),
            "metadata": {},
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "tool_choice": "auto",
            "tools": [],
            "truncation": "disabled",
        }

    def whole_answer(self, end: End) -> JSON:
        return self._response(self._status(end), end)

    def beginning(self) -> bytes:
        response = self._response("in_progress", None)
        created = self._event("response.created", response=response)
        return created + self._event("response.in_progress", response=response)

    def last(self, end: End) -> bytes:
        status = self._status(end)
        return self._event(f"response.{status}", response=self._response(status, end))

    def failure(self, error: RequestError) -> bytes:
        code = error.body["error"]["code"] or "server_error"
        response = self._response("failed", None)
        response["error"] = {"code": code, "message": str(error)}
        return self._event("response.failed", response=response)

    def _status(self, end: End) -> str:
        return "completed" if end.reason in COMPLETE else "incomplete"

    def _response(self, status: str, end: End | None) -> JSON:
        reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
        output = [self._item(block) for block in self.blocks]
        usage = None if end is None else self._usage(end)
        end_fields = {"incomplete_details": reason, "output": output, "usage": usage}
        return {**self._head, "status": status, **end_fields}

    def _usage(self, end: End) -> JSON:
        prompt, cached = self.prompt_counts([end])
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": cached},
            "output_tokens": end.stats.generated_tokens,
            "output_tokens_details": {"reasoning_tokens": end.thinking_tokens},
            "total_tokens": prompt + end.stats.generated_tokens,
        }

    def events(self, change: Change, block: AnswerBlock, content: str) -> Iterator[bytes]:
        ids = {"item_id": self._id(block), "output_index": block.index}
        content_ids = {**ids, "content_index": 0}
        name = {
            "text": "response.output_text",
            "thinking": "response.reasoning_text",
            "call": "response.function_call_arguments",
        }[block.kind]
        inner = ids if block.kind == "call" else content_ids
        if block.kind == "text":
            inner = {**inner, "logprobs": []}
        if change == "add":
            yield self._event(f"{name}.delta", **inner, delta=content)
        elif change == "open":
            item = self._item(block, "in_progress")
            yield self._event("response.output_item.added", output_index=block.index, item=item)
            if block.kind != "call":
                yield self._event("response.content_part.added", **content_ids, part=_part(block))
        else:
            whole = "arguments" if block.kind == "call" else "text"
            yield self._event(f"{name}.done", **inner, **{whole: block.content})
            if block.kind != "call":
                yield self._event("response.content_part.done", **content_ids, part=_part(block))
            item = self._item(block)
            yield self._event("response.output_item.done", output_index=block.index, item=item)

    def _item(self, block: AnswerBlock, status: str = "") -> JSON:
        # A client runs a completed call, and this one's arguments are no whole JSON.
        status = status or ("incomplete" if block.is_cut_off else "completed")
        head = {"id": self._id(block), "status": status}
        if block.kind == "call":
            called = {"call_id": block.id, "name": block.name, "arguments": block.content}
            return {"type": "function_call", **head, **called}
        content = [] if status == "in_progress" else [_part(block)]
        if block.kind == "thinking":
            return {"type": "reasoning", **head, "summary": [], "content": content}
        return {"type": "message", **head, "role": "assistant", "content": content}

    def _id(self, block: AnswerBlock) -> str:
        while len(self._ids) <= block.index:
            self._ids.append(f"item_{secrets.token_hex(12)}")
        return self._ids[block.index]

    def _event(self, name: str, **fields: Any) -> bytes:
        self._number += 1
        return to_event({"type": name, "sequence_number": self._number, **fields}, name)


def _part(block: AnswerBlock) -> JSON:
    if block.kind == "thinking":
        return {"type": "reasoning_text", "text": block.content}
    return {"type": "output_text", "text": block.content, "annotations": [], "logprobs": []}
