"""Ollama's /api/chat and /api/generate: a body becomes a request, and the answer Ollama's lines.

| field                          | taken as                                                |
| ------------------------------ | ------------------------------------------------------- |
| messages, tools                | OpenAI's; a result belongs to the call of its tool_name |
| prompt, system                 | a question and a system message; a text with raw        |
| no messages, an empty prompt   | loads the model, or unloads it if keep_alive is 0       |
| format                         | "json" or a JSON schema                                 |
| options                        | numbers as in a chat of OpenAI; num_predict is a length |
| options.seed                   | -1 for a seed drawn by chance                           |
| think                          | as far as the model's template knows it                 |
| stream                         | true if it is not given                                 |
| images, suffix                 | refused                                                 |
| other options, all others      | ignored and named, or refused if strict                 |
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Container, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, FailFast, Field

from mixchat.base.context import Context
from mixchat.face.events import End, Piece
from mixchat.face.request import Request
from mixchat.serving.requests import shared, tool_fields
from mixchat.serving.requests.errors import RequestError, field_error
from mixchat.serving.requests.fields import (
    JSON,
    RequestObject,
    max_items,
    only,
    read_known,
    to_json,
)
from mixchat.serving.requests.shared import APIRequest
from mixchat.serving.web.responses import ResponseBuilder, call_arguments
from mixchat.text.messages import Message
from mixchat.text.tool_call import CallDelta, ToolCall, joined_calls

if TYPE_CHECKING:
    from mixchat.face.model import Model
    from mixchat.serving.web.served_models import ModelFacts

# Clients compare it with the Ollama that they need.
API_VERSION = "0.33.0"
_QUESTIONS = {"/api/chat": "messages", "/api/generate": "prompt"}
NO_TIME = (0, "0", "0s", "0m", "0h")
_FOREVER_S = 300 * 365 * 86_400.0  # Ollama's expires_at of a model that stays loaded
_REASONS = {"length": "length", "context": "length"}
_NO_IMAGES = only(([], ""), "unsupported_parameter", "is not supported: the model reads text alone")


class _OllamaFunction(RequestObject):
    ignored = ("index", "description")
    name: tool_fields.ToolName
    arguments: JSON = Field({})


class _Call(RequestObject):
    ignored = ("type", "index")
    id: str = ""
    function: _OllamaFunction


class _OllamaMessage(RequestObject):
    role: Literal["system", "user", "assistant", "tool"]
    content: str = ""
    thinking: str = ""
    images: Annotated[Any, _NO_IMAGES] = None
    tool_calls: Annotated[list[_Call], FailFast()] = Field([])
    tool_name: str = ""
    tool_call_id: str = ""


def _drawn(seed: Any) -> Any:
    """Return a seed drawn by chance for -1, which is Ollama's default."""
    return secrets.randbelow(2**32) if type(seed) is int and seed == -1 else seed


class _Options(shared.SamplingFields):
    stop: shared.Stops = Field([])
    # Ollama's -1 and -2 are as many as fit.
    num_predict: Annotated[
        shared.Length, BeforeValidator(lambda n: 0 if type(n) is int and n < 0 else n)
    ] = None
    seed: Annotated[Any, shared.declared("seed"), BeforeValidator(_drawn)] = None


class _OllamaFields(RequestObject):
    ignored: ClassVar[tuple[str, ...]] = ("model", "logprobs", "top_logprobs")
    messages: Annotated[list[_OllamaMessage], FailFast(), max_items(shared.MAX_MESSAGES)] = Field(
        []
    )
    prompt: str = ""
    system: str = ""
    raw: bool = False
    format: Annotated[Any, AfterValidator(shared.small_form)] = ""
    options: JSON = Field({})
    tools: tool_fields.FunctionFields = Field([])
    think: bool | str | None = None
    stream: bool = True
    images: Annotated[Any, _NO_IMAGES] = None
    suffix: Annotated[Any, only(("",), "unsupported_parameter", "is not supported")] = None


def read_ollama_chat(body: JSON, model: Model, strict: bool, at_end: ExitStack) -> APIRequest:
    """Return the request of a body of /api/chat. Raises as `read_chat` does."""
    fields, unused = read_known(_OllamaFields, body)
    if not fields.messages:
        raise field_error("messages", "is missing or empty", "missing_required_parameter")
    shared.check_model(body.get("model"), model.name)
    return _request(fields, Request(_messages(fields.messages)), unused, model, strict, at_end)


def read_generate(body: JSON, model: Model, strict: bool, at_end: ExitStack) -> APIRequest:
    """Return the request of a body of /api/generate. Raises as `read_chat` does."""
    fields, unused = read_known(_OllamaFields, body)
    shared.check_model(body.get("model"), model.name)
    if fields.raw:
        request = Request(prompt=fields.prompt)
    else:
        system = [Message("system", fields.system)] if fields.system else []
        request = Request([*system, Message("user", fields.prompt)])
    return _request(fields, request, unused, model, strict, at_end)


def _request(
    fields: _OllamaFields,
    request: Request,
    unused: Sequence[str],
    model: Model,
    strict: bool,
    at_end: ExitStack,
) -> APIRequest:
    """Return the request with the fields that chats and texts share."""
    options, unknown = read_known(_Options, fields.options, "options")
    think = fields.think if isinstance(fields.think, bool) else None
    effort = fields.think if isinstance(fields.think, str) else None
    variables, used = shared.thinking_variables(model.template.thinking, think, effort)
    has_effect = bool(used) or fields.think in (None, False, "none")
    unused = [*unused, *unknown, *([] if has_effect else ["think"])]
    form: JSON | None = None
    if fields.format == "json":
        form = {"type": "object"}
    elif isinstance(fields.format, dict):
        form = fields.format
    elif fields.format != "":
        raise field_error("format", 'has to be "json" or a JSON schema', "invalid_value")
    request = replace(
        request,
        sampling=shared.sampling_of(model, options),
        max_tokens=options.num_predict,
        stop=tuple(options.stop),
        variables=variables,
        tools=tool_fields.tool_offer(tool_fields.offered(fields.tools)),
        form=form,
    )
    return shared.api_request(
        model,
        [request],
        at_end,
        form_field="format",
        stream=fields.stream,
        ignored=shared.check_unused(unused, strict),
    )


def _messages(fields: Sequence[_OllamaMessage]) -> list[Message]:
    """Return the messages. A result without an id is for the first call of its tool.

    Raises `RequestError`.
    """
    messages = list[Message]()
    paths = list[str]()
    waiting: list[ToolCall] = []  # without a result yet
    for number, field in enumerate(fields):
        path = f"messages[{number}]"
        call_id = ""
        calls = tuple(
            ToolCall(
                call.id or f"call_{number}_{i}",
                call.function.name,
                json.dumps(call.function.arguments),
            )
            for i, call in enumerate(field.tool_calls)
        )
        if calls:
            waiting = list(calls)
        path += ".tool_calls"
        if field.role == "tool":
            path = f"messages[{number}].tool_{'call_id' if field.tool_call_id else 'name'}"
            answered = [c for c in waiting if field.tool_name in ("", c.name)][:1]
            waiting = [call for call in waiting if call not in answered]
            # A name without a call is refused as an id without a call is.
            call_id = field.tool_call_id or next((c.id for c in answered), field.tool_name)
        thinking = field.thinking if calls else ""
        messages.append(
            Message(field.role, field.content, thinking=thinking, calls=calls, call_id=call_id)
        )
        paths.append(path)
    tool_fields.check_results(messages, paths)
    return messages


class OllamaResponses(ResponseBuilder):
    """The answers of /api/chat, a line of JSON for each piece."""

    content_type = "application/x-ndjson"

    def __init__(self, request: APIRequest, model: Model) -> None:
        super().__init__(request, model)
        self._start = time.perf_counter_ns()
        self._calls: list[CallDelta] = []

    def whole(self, answers: Sequence[tuple[Piece, End]]) -> JSON:
        ((piece, end),) = answers
        return {**_head(self._model), **self._content(piece), **self._end(end)}

    def piece(self, number: int, piece: Piece) -> bytes:
        self._calls += piece.calls  # Ollama's clients want each call whole
        if not piece.text and not piece.thinking:
            return b""
        return self._line(self._content(replace(piece, calls=())), {"done": False})

    def ending(self, number: int, end: End) -> bytes:
        calls = Piece(calls=tuple(self._calls))
        called = self._line(self._content(calls), {"done": False}) if self._calls else b""
        return called + self._line(self._content(Piece()), self._end(end))

    def failure(self, error: RequestError) -> bytes:
        return to_json(error_body(error)) + b"\n"

    def comment(self, text: str) -> bytes:
        return b""  # a line has to be a part of the answer

    def _content(self, piece: Piece) -> JSON:
        message: JSON = {"role": "assistant", "content": piece.text}
        if piece.thinking:
            message["thinking"] = piece.thinking
        calls = list[JSON]()
        for call in joined_calls(piece.calls):
            # A call that the limit cut off would run with other arguments.
            if (arguments := call_arguments(call.arguments)) is not None:
                function = {"name": call.name, "arguments": arguments}
                calls.append({"id": call.id, "function": function})
        return {"message": {**message, **({"tool_calls": calls} if calls else {})}}

    def _line(self, content: JSON, more: JSON) -> bytes:
        return to_json({**_head(self._model), **content, **more}) + b"\n"

    def _end(self, end: End) -> JSON:
        """Return the counts of an answer, with times in nanoseconds."""
        (prompt, _), stats = self.prompt_counts([end]), end.stats
        return {
            "done": True,
            "done_reason": _REASONS.get(end.reason, "stop"),
            "total_duration": time.perf_counter_ns() - self._start,
            "load_duration": 0,
            "prompt_eval_count": prompt,
            "prompt_eval_duration": _nanoseconds(stats.prefill_seconds),
            "eval_count": stats.generated_tokens,
            "eval_duration": _nanoseconds(stats.decode_seconds),
        }


class GenerateResponses(OllamaResponses):
    """The answers of /api/generate."""

    def _content(self, piece: Piece) -> JSON:
        thinking = {"thinking": piece.thinking} if piece.thinking else {}
        return {"response": piece.text, **thinking}


def _nanoseconds(seconds: float) -> int:
    """Return a time by which Ollama's clients divide a count of tokens, so it is never 0."""
    return max(1, round(seconds * 1e9))


def asks_nothing(path: str, body: JSON) -> bool:
    """Return whether a request only loads or unloads a model."""
    return path in _QUESTIONS and body.get(_QUESTIONS[path]) in (None, "", [])


def empty_answer(path: str, name: str, reason: str) -> JSON:
    """Return the answer of a request that asks nothing."""
    message: JSON = {"message": {"role": "assistant", "content": ""}}
    content = message if path == "/api/chat" else {"response": ""}
    return {**_head(name), **content, "done": True, "done_reason": reason}


def loaded_list(
    models: Mapping[str, ModelFacts | None], context: Context, idle_s: float | None
) -> JSON:
    """Return the answer of /api/ps. The models are unloaded after `idle_s` seconds, if ever."""
    idle_s = _FOREVER_S if idle_s is None else min(idle_s, _FOREVER_S)
    expires = (datetime.now(UTC) + timedelta(seconds=idle_s)).isoformat()
    loaded = {"size_vram": 0, "expires_at": expires, "context_length": context.tokens}
    return {"models": [{**model_entry(name, facts), **loaded} for name, facts in models.items()]}


def named(body: JSON, names: Container[str]) -> str:
    """Return the model that a body names. Raises `RequestError` for an unknown model."""
    name = str(body.get("model") or body.get("name") or "").removesuffix(shared.LATEST)
    if name not in names:
        raise RequestError(f"there is no model {name!a:.80} here", status=404)
    return name


def describe(name: str, context: Context, facts: ModelFacts | None, *, thinks: bool) -> JSON:
    """Return the answer of /api/show. `thinks` is whether the model is known to think."""
    family = "mixchat" if facts is None else facts.family
    info: JSON = {"general.architecture": family, f"{family}.context_length": context.tokens}
    if facts is not None:
        info["general.parameter_count"] = facts.parameters
    capabilities = ["completion", "tools", *(["thinking"] if thinks else [])]
    return {**model_entry(name, facts), "model_info": info, "capabilities": capabilities}


def _head(name: str) -> JSON:
    return {"model": name, "created_at": datetime.now(UTC).isoformat()}


def model_entry(name: str, facts: ModelFacts | None) -> JSON:
    """Return a model's entry. Some clients refuse one without size, digest or details."""
    tagged = name if ":" in name else f"{name}{shared.LATEST}"  # Open WebUI asks for no other name
    model: JSON = {"name": tagged, "model": tagged}
    if facts is None:  # the model's files are damaged or gone
        digest = hashlib.sha256(name.encode()).hexdigest()
        details = dict.fromkeys(("family", "parameter_size", "quantization_level"), "")
        modified = datetime.now(UTC)
        families = []
    else:
        digest = facts.digest
        families = [facts.family]
        modified = datetime.fromtimestamp(facts.modified, UTC)
        details = {
            "family": facts.family,
            "parameter_size": _count(facts.parameters),
            "quantization_level": f"{facts.quantization}, {facts.bits:.3g} bits",
        }
    return {
        **model,
        "modified_at": modified.isoformat(),
        "size": 0 if facts is None else facts.size,
        "digest": digest,
        "details": {"format": "mixchat", "families": families, **details},
    }


def _count(parameters: int) -> str:
    """Return `46702792704` as `46.7B`."""
    factor, unit = (10**9, "B") if parameters >= 10**9 else (10**6, "M")
    return f"{parameters / factor:.1f}{unit}"


def error_body(error: RequestError) -> JSON:
    """Return an error in Ollama's form."""
    return {"error": str(error)}
