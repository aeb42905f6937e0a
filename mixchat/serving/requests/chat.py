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
| logprobs, top_logprobs                     | at most MAX_LOGPROBS                               |
| response_format, grammar                   | a JSON schema, or GBNF and Lark as in llama.cpp    |
| response_format.schema                     | llama.cpp's, with the type json_object             |
| tools, tool_choice, parallel_tool_calls    | OpenAI's                                           |
| functions, function_call                   | ignored and named, or refused if they force a call |
| chat_template_kwargs, reasoning_effort,    | as far as the model's template knows them, else    |
| think                                      | ignored and named, or refused if strict            |
| modalities                                 | only ["text"]                                      |
| model                                      | the served one, if given                           |
| user, metadata and other labels            | ignored                                            |
| store                                      | only false                                         |
| FOREIGN                                    | ignored and named, or refused if strict            |
| audio, and all others                      | refused                                            |
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import FailFast, Field, ValidationInfo, WrapValidator

from mixchat.base.errors import alternatives
from mixchat.face.request import Request
from mixchat.serving.requests import shared, tool_fields
from mixchat.serving.requests.errors import field_error, value_error
from mixchat.serving.requests.fields import JSON, RequestObject, max_items, only, validated, wrong
from mixchat.serving.requests.openai import OpenAIFields, TopLogprobs, read_openai
from mixchat.serving.requests.shared import APIRequest
from mixchat.text.messages import PRESERVES, Message
from mixchat.text.thinking import EFFORT, EFFORTS, SWITCHES, ThinkingFormat

if TYPE_CHECKING:
    from mixchat.face.model import Model

_KWARGS = "chat_template_kwargs"
_CHOICE = "none, auto, required, or a function with its name"
_NO_FUNCTIONS = "is not supported: use tools"
_NO_CALL = "cannot be followed: use tools and tool_choice"
_TEXT_ONLY = "is not supported: the model reads and writes text alone"
_NO_EFFORT = 'has to be "none": the model does not reason apart'
# An empty list counts as not given.
_FunctionCall: TypeAlias = Annotated[Any, only(([],), "unsupported_parameter", _NO_FUNCTIONS)]
_Media: TypeAlias = Annotated[Any, only(([],), "unsupported_parameter", _TEXT_ONLY)]


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
