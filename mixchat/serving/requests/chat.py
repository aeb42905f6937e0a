"""OpenAI's /v1/chat/completions: a body becomes a request.

| field                                      | taken as                                           |
| ------------------------------------------ | -------------------------------------------------- |
| messages                                   | system, developer, user, assistant, tool, as text  |
| messages[-1] of the assistant              | the beginning of the answer                        |
| messages[].name                            | ignored                                            |
| messages[].reasoning_content               | ignored without tool_calls or preserve_thinking    |
| temperature, top_p, seed                   | OpenAI's, else the model's advice                  |
| top_k, min_p, repeat_penalty               | mixchat's own                                      |
| repetition_penalty                         | as repeat_penalty                                  |
| presence_penalty, frequency_penalty        | OpenAI's                                           |
| logit_bias                                 | by token id                                        |
| max_tokens, max_completion_tokens          | 0 for as many as fit                               |
| n                                          | up to what the server can take                     |
| stop, stream, stream_options.include_usage | OpenAI's                                           |
| logprobs, top_logprobs                     | at most _MAX_LOGPROBS                              |
| response_format, grammar                   | a JSON schema, or GBNF and Lark as in llama.cpp    |
| tools, tool_choice, parallel_tool_calls    | OpenAI's                                           |
| functions, function_call                   | ignored and named, or refused if they force a call |
| chat_template_kwargs, reasoning_effort,    | as far as the model's template knows them, else    |
| think                                      | ignored and named, or refused if strict            |
| modalities                                 | only ["text"]                                      |
| model                                      | the served one, if given                           |
| user, metadata and other labels            | ignored                                            |
| store                                      | only false                                         |
| _FOREIGN                                   | ignored and named, or refused if strict            |
| audio, and all others                      | refused                                            |
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar

from pydantic import FailFast, Field, ValidationInfo, WrapValidator, field_validator

from mixchat.base.errors import alternatives
from mixchat.face.request import Form, Request
from mixchat.serving.requests import shared, tool_fields
from mixchat.serving.requests.errors import field_error, value_error
from mixchat.serving.requests.fields import (
    JSON,
    RequestObject,
    checked,
    max_items,
    only,
    validated,
    within,
    wrong,
)
from mixchat.serving.requests.shared import APIRequest
from mixchat.text.messages import PRESERVES, Message
from mixchat.text.thinking import EFFORT, EFFORTS, SWITCHES, ThinkingFormat

if TYPE_CHECKING:
    from mixchat.base.options import SamplingOptions
    from mixchat.face.model import Model

_MAX_LOGPROBS = 20
# Other servers' fields that only tune an answer, with the values that apply here.
_FOREIGN = {
    "cache_prompt": True,
    "chat_template_kwargs": {},
    "keep_alive": None,
    "num_ctx": None,
    "options": {},
    "reasoning_effort": "none",
    "think": False,
    "verbosity": None,
}
_KWARGS = "chat_template_kwargs"
_PENALTY = "repetition_penalty"  # of vLLM and Hugging Face
_CHOICE = "none, auto, required, or a function with its name"
_NO_FUNCTIONS = "is not supported: use tools"
_NO_CALL = "cannot be followed: use tools and tool_choice"
_TEXT_ONLY = "is not supported: the model reads and writes text alone"
_NO_EFFORT = 'has to be "none": the model does not reason apart'
# A server holds these for each token until a client takes them.
TopLogprobs = Annotated[
    int | None, within(replace(shared.OPTIONS["top_logprobs"], most=_MAX_LOGPROBS))
]
# An empty list counts as not given.
_FunctionCall: TypeAlias = Annotated[Any, only(([],), "unsupported_parameter", _NO_FUNCTIONS)]
_Media: TypeAlias = Annotated[Any, only(([],), "unsupported_parameter", _TEXT_ONLY)]


class _JSONSchema(RequestObject):
    ignored = ("name", "description")
    strict: bool = False  # every schema is followed to the letter
    schema_: Annotated[shared.Schema, Field(alias="schema")]


class _ResponseFormat(RequestObject):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JSONSchema | None = Field(None, validate_default=True)

    @field_validator("json_schema", mode="before")
    @classmethod
    def _belongs_to_type(cls, schema: Any, info: ValidationInfo) -> Any:
        has_schema = info.data.get("type") == "json_schema"
        if has_schema and schema is None:
            raise wrong("missing_required_parameter", "is missing")
        if schema is not None and not has_schema:
            raise wrong("unknown_parameter", "belongs to the type json_schema alone")
        return schema


class _StreamOptions(RequestObject):
    ignored = ("include_obfuscation",)
    include_usage: bool = False


class OpenAIFields(shared.SamplingFields):
    """The fields that OpenAI's chats and completions share."""

    ignored: ClassVar[tuple[str, ...]] = (
        *("model", "user", "metadata", "service_tier", "prompt_cache_key", "safety_identifier"),
    )
    store: Annotated[
        bool, only((False,), "unsupported_value", "has to be false: answers are not stored")
    ] = False
    logit_bias: dict[str, Any] = Field({})
    max_tokens: shared.Length = None
    max_completion_tokens: shared.Length = None
    stop: shared.Stops = Field([])
    n: int = 1
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()
    response_format: _ResponseFormat | None = None
    grammar: shared.Grammar = ""

    @field_validator("grammar")
    @classmethod
    def _stands_alone(cls, grammar: str, info: ValidationInfo) -> str:
        if grammar and info.data.get("response_format") is not None:
            raise wrong(None, "and response_format exclude each other")
        return grammar

    def form(self) -> Form | None:
        """Return the form of answers, None for text."""
        format = self.response_format
        if self.grammar or format is None or format.type == "text":
            return self.grammar or None
        return {"type": "object"} if format.json_schema is None else format.json_schema.schema_

    def length(self) -> int | None:
        """Return the most tokens of an answer. Raises `RequestError` if there are two."""
        old = self.max_tokens
        new = self.max_completion_tokens
        if old is not None and new is not None and old != new:
            raise field_error("max_tokens", "and max_completion_tokens differ: give one of them")
        return old if new is None else new


_Fields = TypeVar("_Fields", bound=OpenAIFields)


def read_openai(
    fields_type: type[_Fields], body: JSON, model: Model, strict: bool
) -> tuple[_Fields, SamplingOptions, tuple[str, ...]]:
    """Return a body's fields, its sampling, and the names of fields without an effect.

    Raises `RequestError` for the first wrong field.
    """
    shared.check_model(body.get("model"), model.name)
    ignored: tuple[str, ...] = ()
    if not strict:
        ignored = tuple(
            name for name, usual in _FOREIGN.items() if body.get(name) not in (None, [], usual)
        )
        body = {name: value for name, value in body.items() if name not in _FOREIGN}
        if (penalty := body.pop(_PENALTY, None)) is not None:
            checked(penalty, shared.OPTIONS["repeat_penalty"], _PENALTY)
            if body.get("repeat_penalty") not in (None, penalty):
                raise field_error(_PENALTY, "and repeat_penalty differ: give one of them")
            body["repeat_penalty"] = penalty
    fields = validated(fields_type, body)
    limit = shared.max_answers(model)
    if not 1 <= fields.n <= limit:
        raise value_error("n", f"between 1 and {limit}", fields.n)
    sampling = shared.sampling_of(model, fields, fields.logit_bias)
    return fields, sampling, ignored


class _TextPart(RequestObject):
    type: Literal["text"]
    text: str


def _text(content: Any, parts_of: Callable[[Any], list[_TextPart]], info: ValidationInfo) -> Any:
    # OpenAI's answers with calls have null as their content.
    if content is None and info.data.get("tool_calls"):
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise wrong("invalid_value", "has to be a string or a list of parts")
    return "".join(part.text for part in parts_of(content))


class _CalledFunction(RequestObject):
    name: tool_fields.ToolName
    arguments: str


class _CalledTool(RequestObject):
    ignored = ("index",)
    id: str
    type: Literal["function"] = "function"
    function: _CalledFunction


class _ChatMessage(RequestObject):
    # An answer that a client sends back has fields of OpenAI's and of other servers' answers.
    ignored = ("name", "reasoning")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    reasoning_content: Any = None
    tool_calls: Annotated[list[_CalledTool], FailFast()] = Field([])
    tool_call_id: str = ""
    function_call: _FunctionCall = None
    audio: _Media = None
    refusal: _Media = None
    annotations: _Media = None
    # A string in the end, by `_text`.
    content: Annotated[
        list[_TextPart], FailFast(), max_items(shared.MAX_PARTS), WrapValidator(_text)
    ] = Field(None, validate_default=True)

    def message(self, path: str) -> Message:
        """Return the message. Raises `RequestError` for the arguments of a call."""
        calls = tuple(
            tool_fields.checked_call(
                call.id,
                call.function.name,
                call.function.arguments,
                f"{path}.tool_calls[{number}].function.arguments",
            )
            for number, call in enumerate(self.tool_calls)
        )
        thinking = self.reasoning_content
        return Message(
            "system" if self.role == "developer" else self.role,
            str(self.content),
            thinking=thinking if isinstance(thinking, str) else "",
            calls=calls,
            call_id=self.tool_call_id,
        )


class _Named(RequestObject):
    name: str


class _ChosenFunction(RequestObject):
    type: Literal["function"]
    function: _Named


class _ChatFields(OpenAIFields):
    # `functions` and `function_call` were OpenAI's names before there were tools.
    functions: Any = None
    tools: tool_fields.FunctionFields = Field([])
    tool_choice: Any = "auto"
    parallel_tool_calls: bool = True
    logprobs: bool = False
    top_logprobs: TopLogprobs = None
    function_call: Annotated[Any, only(("none", "auto"), "unsupported_value", _NO_CALL)] = None
    audio: _Media = None
    web_search_options: _Media = None
    modalities: Annotated[Any, only((["text"],), "invalid_value", 'has to be ["text"]')] = None
    reasoning_effort: Annotated[Any, only(("none",), "invalid_value", _NO_EFFORT)] = None
    messages: Annotated[list[_ChatMessage], FailFast(), max_items(shared.MAX_MESSAGES)] = Field([])


def read_chat(body: JSON, model: Model, strict: bool, at_end: ExitStack) -> APIRequest:
    """Return the request of a body with its prompt, which takes seconds for a long conversation.

    strict: refuse other servers' fields. Raises `RequestError` and `PromptError`.
    """
    body, variables = _take_thinking(body, model.template.thinking)
    fields, sampling, ignored = read_openai(_ChatFields, body, model, strict)
    ignored += ("functions",) if fields.functions not in (None, []) else ()
    if fields.top_logprobs and not fields.logprobs:
        raise field_error("top_logprobs", "needs logprobs: true", "invalid_value")
    if not fields.messages:
        raise field_error("messages", "is missing or empty", "missing_required_parameter")
    messages = list[Message]()
    paths = list[str]()
    for i, field in enumerate(fields.messages):
        messages.append(field.message(f"messages[{i}]"))
        has_id = field.role == "tool" or field.tool_call_id
        paths.append(f"messages[{i}].{'tool_call_id' if has_id else 'tool_calls'}")
    tool_fields.check_results(messages, paths)
    choice = fields.tool_choice
    function = None
    if isinstance(choice, dict):
        function = validated(_ChosenFunction, choice, "tool_choice").function.name
    elif choice not in ("none", "auto", "required"):
        raise value_error("tool_choice", _CHOICE, choice)
    offer = tool_fields.tool_offer(
        tool_fields.offered(fields.tools), choice, function, parallel=fields.parallel_tool_calls
    )
    if offer is not None and fields.grammar:
        raise field_error("grammar", "and tools exclude each other")
    request = Request(
        messages,
        sampling=sampling,
        max_tokens=fields.length(),
        stop=tuple(fields.stop),
        variables=variables,
        tools=offer,
        form=fields.form(),
        top_logprobs=(fields.top_logprobs or 0) if fields.logprobs else None,
    )
    return shared.api_request(
        model,
        [request],
        at_end,
        n=fields.n,
        stream=fields.stream,
        include_usage=fields.stream_options.include_usage,
        ignored=ignored,
    )


def _take_thinking(body: JSON, format: ThinkingFormat | None) -> tuple[JSON, JSON]:
    """Return a body without the fields that the model's template knows, and its variables.

    Only variables with a few known values are taken, since others could put control tokens into a
    prompt. Raises `RequestError` for a value of the wrong type.
    """
    if format is None:
        return body, {}
    think = body.get("think")
    kwargs = body.get(_KWARGS)
    variables, used = shared.thinking_variables(
        format, think if isinstance(think, bool) else None, body.get(EFFORT)
    )
    names = {"think": "think", "effort": EFFORT}
    remaining = {
        name: value for name, value in body.items() if name not in [names[n] for n in used]
    }
    if isinstance(kwargs, dict):
        known = {name: kwargs[name] for name in format.variables if name in kwargs}
        remaining[_KWARGS] = {name: value for name, value in kwargs.items() if name not in known}
        if not remaining[_KWARGS]:
            del remaining[_KWARGS]
        variables |= known
    for name, value in variables.items():
        if name in (*SWITCHES, PRESERVES) and not isinstance(value, bool):
            raise value_error(f"{_KWARGS}.{name}", "true or false", value)
        if name == EFFORT and value not in EFFORTS:
            raise value_error(f"{_KWARGS}.{name}", alternatives(EFFORTS), value)
    return remaining, variables
