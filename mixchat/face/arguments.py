"""The arguments of `Model.chat` become a request, also in the forms that other libraries take."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, TypedDict

from mixchat.base.errors import UsageError, short_repr, unknown_argument
from mixchat.base.options import Overflow, SamplingOptions
from mixchat.face.functions import PythonTool, form_of, is_type
from mixchat.face.request import Request, ToolOffer
from mixchat.face.tool_results import MAX_ROUNDS
from mixchat.face.turn import Turn
from mixchat.text.form.output_constraint import schema_text
from mixchat.text.messages import Message
from mixchat.text.tool_call import TOOL_NAME, TOOL_NAME_RULE, Tool

_OTHER_NAMES = {
    "form": (
        *("schema", "json_schema", "output_schema", "response_format", "response_model"),
        *("format", "grammar"),
    ),
    "temperature": ("temp",),
    "max_tokens": (
        *("max_new_tokens", "max_completion_tokens", "max_output_tokens", "max_length"),
        *("n_predict", "num_predict"),
    ),
    "repeat_penalty": ("repetition_penalty",),
    "stop": ("stop_sequences", "stop_strings"),
    "think": ("enable_thinking", "thinking", "reasoning"),
    "tools": ("functions",),
    "tool_choice": ("function_call",),
    "top_logprobs": ("logprobs",),
}
# Advice for names that other programs use.
_ADVICE = {other: f"write {name}" for name, others in _OTHER_NAMES.items() for other in others}
_ADVICE |= dict.fromkeys(
    ("system", "system_prompt", "instructions"),
    'begin the messages with {"role": "system", "content": ...}',
)
_ADVICE |= dict.fromkeys(
    ("n_ctx", "num_ctx", "context_size"), "mixchat.load takes it, as context_size"
)
_ADVICE["stream"] = "iterate over the answer for its events, or take its text()"
_CHOICE_RULE = 'tool_choice has to be "none", "auto", "required" or the name of a tool'


class ChatArguments(TypedDict, total=False):
    """The options of `Model.chat` and their types, for type checkers. None chooses the default."""

    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repeat_penalty: float | None
    seed: int | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] | None
    sampling: SamplingOptions | Mapping[str, Any] | None
    max_tokens: int | None
    stop: str | Sequence[str] | None
    overflow: Overflow | None
    top_logprobs: int | None
    think: bool | None
    variables: Mapping[str, Any] | None
    tools: Sequence[Callable[..., Any] | Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any] | None
    max_rounds: int | None
    form: Any  # a type checker has no name for all types, such as Literal


def turn_of(check: Callable[[Request], Request], max_result: int, **options: Any) -> Turn:
    """Return the turn of `request_of`'s request, and of functions and a type among its options.

    Raises as `request_of`, `check`, `PythonTool` and `form_of` do, and `UsageError` for
    `max_rounds`.
    """
    max_rounds = options.pop("max_rounds", None)
    if max_rounds is None:
        max_rounds = MAX_ROUNDS
    elif type(max_rounds) is not int or max_rounds < 1:
        raise UsageError(f"max_rounds has to be 1 or more, not {short_repr(max_rounds)}")
    functions: dict[str, PythonTool] = {}
    if isinstance(tools := options.get("tools"), list | tuple):
        known = [PythonTool(tool) if callable(tool) else tool for tool in tools]
        functions = {each.tool.name: each for each in known if isinstance(each, PythonTool)}
        options["tools"] = [getattr(each, "tool", each) for each in known]
    form = options.get("form")
    read: Callable[[str], Any] | None = json.loads if isinstance(form, dict) else None
    if is_type(form):
        options["form"], read = form_of(form)
    return Turn(check(request_of(**options)), functions, max_rounds, read, max_result)


def request_of(
    messages: str | Sequence[Message | Mapping[str, Any]] = (),
    tool_choice: str | Mapping[str, Any] | None = None,
    **options: Any,
) -> Request:
    """Return a request with options by the names of `Request` and `SamplingOptions`.

    messages: a text is one question. tool_choice: the word or object of OpenAI's, or the name of
    the tool that has to be called. Tools are OpenAI's objects. Raises `UnknownArgumentError`, and
    `UsageError` for tools. `checked_request` checks the other values.
    """
    names = {field.name for field in fields(Request)}
    sampled = {field.name for field in fields(SamplingOptions)}
    for name in options:
        if name not in names | sampled:
            raise unknown_argument(name, ChatArguments.__annotations__, _ADVICE)
    options = {name: value for name, value in options.items() if value is not None}
    numbers = {name: options.pop(name) for name in sampled & options.keys()}
    if isinstance(stop := options.get("stop"), str | list | tuple):
        options["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    if isinstance(tools := options.get("tools", ()), list | tuple):
        options["tools"] = _offer(tuple(map(_tool, tools)), tool_choice)
    sampling = options.pop("sampling", {})
    if isinstance(sampling, SamplingOptions):
        sampling = replace(sampling, **numbers)
    elif isinstance(sampling, Mapping):
        sampling = {**sampling, **numbers}
    # Mappings become messages in `checked_request`.
    raw: Any = [Message("user", messages)] if isinstance(messages, str) else messages
    return Request(raw, sampling=sampling, **options)


def _offer(tools: tuple[Tool, ...], choice: Any) -> ToolOffer | None:
    """Return the offer of tools, None if no tool may be called. Raises `UsageError`."""
    names = {tool.name for tool in tools}
    if len(names) < len(tools):
        raise UsageError("two tools have the same name")
    if choice == "required" and not tools:
        raise UsageError('tool_choice "required" needs tools')
    match choice:
        case None:
            return ToolOffer.of(tools)
        case "none" | "auto" | "required":
            return ToolOffer.of(tools, choice)
        case str(only) | {"type": "function", "function": {"name": str(only)}}:
            if only in names:
                return ToolOffer.of(tools, only=only)
    hint = f"The tools are {', '.join(sorted(names)) or 'none'}."
    raise UsageError(f"{_CHOICE_RULE}, not {short_repr(choice)}", hint=hint)


def _tool(tool: Any) -> Tool:
    function = tool.get("function") if isinstance(tool, Mapping) else None
    if isinstance(function, Mapping) and isinstance(function.get("name"), str):
        tool = Tool(function["name"], function.get("description"), function.get("parameters"))
    if not isinstance(tool, Tool):
        raise UsageError(
            'a tool is a function, or {"type": "function", "function": {"name": ..., ...}}'
        )
    if not TOOL_NAME.fullmatch(tool.name):
        raise UsageError(f"the name of a tool {TOOL_NAME_RULE}, not {short_repr(tool.name)}")
    schema = {} if tool.parameters is None else tool.parameters
    if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
        raise UsageError(f"the parameters of {tool.name} have to be the schema of an object")
    schema_text(schema)
    if not isinstance(tool.description, str | None):
        raise UsageError(f"the description of {tool.name} has to be a text")
    return tool
