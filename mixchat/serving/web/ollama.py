"""Ollama's /api/chat and /api/generate: its requests as OpenAI's chats, and its responses.

| field                          | taken as                                                |
| ------------------------------ | ------------------------------------------------------- |
| messages, tools                | OpenAI's; a result belongs to the call of its tool_name |
| prompt, system                 | a question and a system message; a text with raw        |
| no messages, an empty prompt   | loads the model, or unloads it if keep_alive is 0       |
| format                         | response_format, with objects closed as in Ollama       |
| options                        | _OPTIONS; num_predict is max_tokens                     |
| think                          | as far as the model's template knows it                 |
| stream                         | true if it is not given                                 |
| images, suffix                 | refused                                                 |
| other options, all others      | ignored and named, or refused if strict                 |
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, FailFast, Field

from mixchat.base.errors import UsageError
from mixchat.base.model_config import Context
from mixchat.serving.requests.chat import MAX_MESSAGES, read_chat
from mixchat.serving.requests.completion import read_completion
from mixchat.serving.requests.errors import RequestError, field_error, to_json
from mixchat.serving.requests.fields import RequestObject, known_fields, max_items, only, validated
from mixchat.serving.requests.forms import schema_format, small_form
from mixchat.serving.requests.options import LATEST, LoadedModel, ParsedRequest
from mixchat.serving.requests.tools import MAX_CALLS, call_object
from mixchat.serving.service import Delta, Done
from mixchat.serving.web.responses import JSON, ResponseBuilder, call_arguments
from mixchat.serving.web.served_models import ModelFacts
from mixchat.text.form.schema import closed
from mixchat.text.tool_call import CallDelta, ToolCall, joined_calls

# Clients compare it with the Ollama that they need.
API_VERSION = "0.33.0"
_OPTIONS = (
    *("temperature", "top_p", "top_k", "min_p", "seed", "stop"),
    *("repeat_penalty", "presence_penalty", "frequency_penalty"),
)
_SAME = ("model", "stream", "tools", "think")
_QUESTIONS = {"/api/chat": "messages", "/api/generate": "prompt"}
_NO_TIME = (0, "0", "0s", "0m", "0h")
_FOREVER_S = 300 * 365 * 86_400.0  # Ollama's expires_at of a model that stays loaded
_REASONS = {"length": "length", "context": "length"}
_NO_IMAGES = only(([], ""), "unsupported_parameter", "is not supported: the model reads text alone")


class _Function(RequestObject):
    ignored = ("index", "description")
    name: str
    arguments: dict[str, Any] = Field({})


class _Call(RequestObject):
    ignored = ("type", "index")
    id: str = ""
    function: _Function


class _Message(RequestObject):
    role: str
    content: str = ""
    thinking: str = ""
    images: Annotated[Any, _NO_IMAGES] = None
    tool_calls: Annotated[list[_Call], FailFast(), max_items(MAX_CALLS)] = Field([])
    tool_name: str = ""
    tool_call_id: str = ""


class _Fields(RequestObject):
    ignored: ClassVar[tuple[str, ...]] = (*_SAME, "logprobs", "top_logprobs")
    messages: Annotated[list[_Message], FailFast(), max_items(MAX_MESSAGES)] = Field([])
    prompt: str = ""
    system: str = ""
    raw: bool = False
    format: Annotated[Any, AfterValidator(small_form)] = ""
    options: dict[str, Any] = Field({})
    images: Annotated[Any, _NO_IMAGES] = None
    suffix: Annotated[Any, only(("",), "unsupported_parameter", "is not supported")] = None


def read_ollama_chat(body: dict[str, Any], model: LoadedModel) -> ParsedRequest:
    """Return the job of a body of /api/chat. Raises as `read_chat` does."""
    fields, shared, unused = _read(body, model)
    return read_chat({**shared, "messages": _messages(fields.messages)}, model, unused)


def read_generate(body: dict[str, Any], model: LoadedModel) -> ParsedRequest:
    """Return the job of a body of /api/generate. Raises as `read_chat` does."""
    fields, shared, unused = _read(body, model)
    if fields.raw:
        return read_completion({**shared, "prompt": fields.prompt}, model, unused)
    system = [{"role": "system", "content": fields.system}] if fields.system else []
    chat = {**shared, "messages": [*system, {"role": "user", "content": fields.prompt}]}
    return read_chat(chat, model, unused)


def _read(body: dict[str, Any], model: LoadedModel) -> tuple[_Fields, dict[str, Any], list[str]]:
    """Return the fields of a body, those that OpenAI has, too, and the names of unused ones."""
    body, unused = known_fields(_Fields, body)
    fields, known = validated(_Fields, body), {*_OPTIONS, "num_predict"}
    unused += [f"options.{name}" for name in fields.options if name not in known]
    return fields, _shared(fields, body, model), unused


def _shared(fields: _Fields, body: dict[str, Any], model: LoadedModel) -> dict[str, Any]:
    """Return the fields of chats and completions, in OpenAI's form."""
    chat: dict[str, Any] = {"stream": True}
    chat |= {name: body[name] for name in _SAME if body.get(name) is not None}
    chat |= {name: fields.options[name] for name in _OPTIONS if name in fields.options}
    if (length := fields.options.get("num_predict")) is not None:
        chat["max_tokens"] = 0 if isinstance(length, int) and length < 0 else length
    if isinstance(chat.get("think"), str):
        chat["reasoning_effort"] = chat.pop("think")
    if fields.format == "json":
        chat["response_format"] = {"type": "json_object"}
    elif isinstance(fields.format, dict):
        chat["response_format"] = schema_format(_closed(fields.format, model))
    elif fields.format != "":
        raise field_error("format", 'has to be "json" or a JSON schema', "invalid_value")
    return chat


def _closed(schema: dict[str, Any], model: LoadedModel) -> dict[str, Any]:
    """Return a schema with closed objects, or the schema itself if it could not be met then."""
    made = closed(schema)
    try:
        if made != schema:
            model.compile_form(made)  # in a sandbox, as a client wrote it
    except UsageError as error:
        if error.hint is not None:  # it exceeds a limit
            raise
        return schema
    return made


def _messages(given: Sequence[_Message]) -> list[dict[str, Any]]:
    """Return OpenAI's messages. A result without an id is for the first call of its tool."""
    messages, waiting = list[dict[str, Any]](), list[tuple[str, str]]()  # ids and names
    for number, message in enumerate(given):
        one: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.tool_calls:
            calls = [_call(call, f"call_{number}_{i}") for i, call in enumerate(message.tool_calls)]
            waiting = [(call["id"], call["function"]["name"]) for call in calls]
            one |= {"tool_calls": calls}
            one |= {"reasoning_content": message.thinking} if message.thinking else {}
        if message.role == "tool":
            names = (message.tool_name, "")
            found = next((w for w in waiting if not names[0] or w[1] in names), ("", ""))
            waiting = [w for w in waiting if w != found]
            one["tool_call_id"] = message.tool_call_id or found[0]
        messages.append(one)
    return messages


def _call(call: _Call, id: str) -> dict[str, Any]:
    function = call.function
    return call_object(ToolCall(call.id or id, function.name, json.dumps(function.arguments)))


class OllamaResponses(ResponseBuilder):
    """The answers of /api/chat, a line of JSON for each piece."""

    content_type = "application/x-ndjson"

    def __init__(self, request: ParsedRequest, model: LoadedModel) -> None:
        super().__init__(request, model)
        self._start, self._first = time.perf_counter_ns(), 0
        self._calls: list[CallDelta] = []

    def whole(self, answers: Sequence[tuple[Delta, Done]]) -> JSON:
        ((delta, done),) = answers
        return {**self._head(), **self._content(delta), **self._end(done)}

    def piece(self, number: int, delta: Delta) -> bytes:
        self._first = self._first or time.perf_counter_ns()
        self._calls += delta.calls
        if not delta.text and not delta.thinking:
            return b""
        return self._line(self._content(replace(delta, calls=())), {"done": False})

    def ending(self, number: int, done: Done) -> bytes:
        calls = Delta("", calls=tuple(self._calls))
        called = self._line(self._content(calls), {"done": False}) if self._calls else b""
        return called + self._line(self._content(Delta("")), self._end(done))

    def failure(self, error: RequestError) -> bytes:
        return to_json(error_body(error)) + b"\n"

    def comment(self, text: str) -> bytes:
        return b""

    def _content(self, delta: Delta) -> JSON:
        thinking = {"thinking": delta.thinking} if delta.thinking else {}
        called = [one for one in map(_called, joined_calls(delta.calls)) if one is not None]
        calls = {"tool_calls": called} if called else {}
        return {"message": {"role": "assistant", "content": delta.text, **thinking, **calls}}

    def _line(self, content: JSON, more: JSON) -> bytes:
        return to_json({**self._head(), **content, **more}) + b"\n"

    def _head(self) -> JSON:
        return _head(self._model)

    def _end(self, done: Done) -> JSON:
        """Return the counts of an answer, with times in nanoseconds."""
        now, (prompt, _) = time.perf_counter_ns(), self.prompt_counts([done])
        first = self._first or now
        return {
            "done": True,
            "done_reason": _REASONS.get(done.reason, "stop"),
            "total_duration": now - self._start,
            "load_duration": 0,
            "prompt_eval_count": prompt,
            "prompt_eval_duration": first - self._start,
            "eval_count": done.generated_tokens,
            "eval_duration": now - first,
        }


class GenerateResponses(OllamaResponses):
    """The answers of /api/generate."""

    def _content(self, delta: Delta) -> JSON:
        thinking = {"thinking": delta.thinking} if delta.thinking else {}
        return {"response": delta.text, **thinking}


def asks_nothing(path: str, body: dict[str, Any]) -> bool:
    """Return whether a request only loads or unloads a model."""
    return path in _QUESTIONS and body.get(_QUESTIONS[path]) in (None, "", [])


def is_unload(body: dict[str, Any]) -> bool:
    """Return whether a request without a question unloads its model."""
    return body.get("keep_alive") in _NO_TIME


def empty_answer(path: str, name: str, reason: str) -> JSON:
    """Return the answer of a request that asks nothing."""
    message: JSON = {"message": {"role": "assistant", "content": ""}}
    content = message if path == "/api/chat" else {"response": ""}
    return {**_head(name), **content, "done": True, "done_reason": reason}


def model_list(models: Mapping[str, ModelFacts | None]) -> JSON:
    """Return the answer of /api/tags."""
    return {"models": [_model(name, facts) for name, facts in models.items()]}


def loaded_list(
    models: Mapping[str, ModelFacts | None], context: Context, idle_s: float | None
) -> JSON:
    """Return the answer of /api/ps. The models are unloaded after `idle_s` seconds, if ever."""
    idle_s = _FOREVER_S if idle_s is None else min(idle_s, _FOREVER_S)
    expires = (datetime.now(timezone.utc) + timedelta(seconds=idle_s)).isoformat()
    loaded = {"size_vram": 0, "expires_at": expires, "context_length": context.tokens}
    return {"models": [{**_model(name, facts), **loaded} for name, facts in models.items()]}


def named(body: dict[str, Any], names: Container[str]) -> str:
    """Return the model that a body names. Raises `RequestError` for an unknown model."""
    name = str(body.get("model") or body.get("name") or "").removesuffix(LATEST)
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
    return {**_model(name, facts), "model_info": info, "capabilities": capabilities}


def _head(name: str) -> JSON:
    return {"model": name, "created_at": datetime.now(timezone.utc).isoformat()}


def _model(name: str, facts: ModelFacts | None) -> JSON:
    """Return a model's entry. Some clients refuse one without size, digest or details."""
    tagged = name if ":" in name else f"{name}{LATEST}"  # Open WebUI asks for no other name
    model: JSON = {"name": tagged, "model": tagged}
    if facts is None:  # the model's files are damaged or gone
        digest = hashlib.sha256(name.encode()).hexdigest()
        details = dict.fromkeys(("family", "parameter_size", "quantization_level"), "")
        modified, families = datetime.now(timezone.utc), []
    else:
        digest, families = facts.digest, [facts.family]
        modified = datetime.fromtimestamp(facts.modified, timezone.utc)
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


def _called(call: ToolCall) -> JSON | None:
    """Return a call, None for one that the limit cut off. It would run with other arguments."""
    given = call_arguments(call.arguments)
    if given is None:
        return None
    return {"id": call.id, "function": {"name": call.name, "arguments": given}}
