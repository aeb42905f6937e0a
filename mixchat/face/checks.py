"""Checks the values that a Python program gives, before anything is loaded or computed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from numbers import Integral
from typing import Any, cast, get_args

from mixchat.base.errors import PromptError, UsageError, short_repr
from mixchat.base.option import Option, options_of
from mixchat.base.options import AnswerOptions, LoadOptions, SamplingOptions
from mixchat.face.request import Request, ToolOffer
from mixchat.text.messages import Message, Role
from mixchat.text.tool_call import ToolCall, whole_arguments

_NOT_LISTS = (str, bytes, Mapping)
_BIAS = "logit_bias"


def _is(kind: Any) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind)


def _is_list(value: Any) -> bool:
    has_items = isinstance(value, Iterable) and getattr(value, "ndim", 1) > 0
    return has_items and not isinstance(value, _NOT_LISTS)


def _require(is_usable: bool, name: str, rule: str, value: object) -> None:
    if not is_usable:
        raise UsageError(f"{name} has to be {rule}, not {short_repr(value)}")


def checked_load_options(options: Mapping[str, Any]) -> LoadOptions:
    """Return the options of `mixchat.load`. None counts as not given. Raises `UsageError`."""
    declared = options_of(LoadOptions)
    for name in options:
        if name not in declared:
            hint = f"The options are {', '.join(sorted(declared))}."
            raise UsageError(f"there is no option {name!r}", hint=hint)
    given = {
        name: declared[name].checked(value, name)
        for name, value in options.items()
        if value is not None
    }
    given.setdefault("exact_prompts", given.get("parallel", 1) > 1)
    return LoadOptions(**given)


def checked_request(
    request: Request, advised: SamplingOptions, vocab_size: int, variables: Collection[str]
) -> Request:
    """Return a request whose values can be used, with each of its messages as a `Message`.

    Its numbers are Python's own. What was not chosen of the sampling is as `advised`. variables: of
    the model's template. Raises `UsageError`, and `PromptError` for a message.
    """
    _require(isinstance(request, Request), "the request", "a Request", request)
    for name, is_usable, rule in (
        ("sampling", _is(SamplingOptions | Mapping), "SamplingOptions, or some of them by name"),
        ("think", _is(bool | None), "True, False or None"),
        ("variables", _is(Mapping), "a dict"),
        ("tools", _is(ToolOffer | None), "a list of functions in OpenAI's form"),
        ("messages", _is_list, "a list of messages"),
        ("prompt", lambda value: _is(str | None)(value) or _is_list(value), "a text or token ids"),
    ):
        _require(is_usable(getattr(request, name)), name, rule, getattr(request, name))
    options = {
        name: option.checked(value, name)
        for name, option in options_of(AnswerOptions).items()
        if (value := getattr(request, name)) is not None
    }
    for name, value in request.variables.items():
        if name not in variables:
            hint = f"It has {', '.join(variables) or 'none'}."
            raise UsageError(f"the chat template has no variable {name!r}", hint=hint)
        _require(_is(str | int | float | None)(value), name, "a text or a number", value)
    prompt = request.prompt
    if prompt is not None and not isinstance(prompt, str):
        prompt = _token_ids(prompt, vocab_size)
    messages = tuple(_message(message, vocab_size) for message in request.messages)
    sampling = _sampling(request.sampling, advised, vocab_size)
    changed: Any = {"messages": messages, "prompt": prompt, "sampling": sampling, **options}
    return replace(request, **changed)


def _sampling(
    chosen: SamplingOptions | Mapping[str, Any], advised: SamplingOptions, vocab_size: int
) -> SamplingOptions:
    values = vars(chosen) if isinstance(chosen, SamplingOptions) else chosen
    declared = options_of(SamplingOptions)
    usable: dict[str, Any] = {}
    for name, value in values.items():
        if name == _BIAS:
            usable[name] = _biases(value, declared[name], vocab_size)
        elif name not in declared:
            raise UsageError(f"there is no option {short_repr(name)} of sampling")
        elif value is not None or name != "seed":
            usable[name] = declared[name].checked(value, name)
    return replace(advised, **usable)


def _biases(biases: Any, declared: Option, vocab_size: int) -> tuple[tuple[int, float], ...]:
    pairs = list(biases.items()) if isinstance(biases, Mapping) else biases
    is_usable = _is_list(pairs) and all(_is_list(pair) and len(pair) == 2 for pair in pairs)
    _require(is_usable, _BIAS, "numbers by token id", biases)
    tokens = _token_ids([token for token, _ in pairs], vocab_size)
    amounts = [declared.checked(amount, f"{_BIAS} of a token") for _, amount in pairs]
    return tuple(zip(tokens, amounts, strict=True))


def _token_ids(ids: Any, vocab_size: int) -> tuple[int, ...]:
    _require(_is_list(ids), "a message's ids", "token ids", ids)
    # Arrays and tensors give numbers of Python's.
    ids = tuple(ids.tolist() if hasattr(ids, "tolist") else ids)
    for token in ids:
        is_number = type(token) is int or isinstance(token, Integral)
        if not is_number or not 0 <= int(token) < vocab_size:
            raise UsageError(f"token ids are 0 to {vocab_size - 1}, not {short_repr(token)}")
    return tuple(map(int, ids))


def _message(message: Any, vocab_size: int) -> Message:
    if isinstance(message, Mapping):
        role = message.get("role")
        content = message.get("content")
        tool_calls = message.get("tool_calls")
        call_id = message.get("tool_call_id")
        if tool_calls is None:
            tool_calls = ()
        calls = tuple(map(_call, tool_calls if _is_list(tool_calls) else [tool_calls]))
        if calls and content is None:  # as OpenAI's answers with calls have it
            content = ""
        call_id = "" if call_id is None else str(call_id)
        message = Message(cast("Role", role), cast("str", content), calls=calls, call_id=call_id)
    role = message.role if isinstance(message, Message) else None
    has_role = isinstance(role, str) and role in get_args(Role)
    if not has_role or not isinstance(message.content, str):
        raise PromptError("a message needs a role (system, user, assistant, tool) and its content")
    return _with_own_values(message, vocab_size)


def _with_own_values(message: Message, vocab_size: int) -> Message:
    """Return a message with token ids of Python's, and with whole arguments of its calls."""
    if message.ids is not None:
        message = replace(message, ids=_token_ids(message.ids, vocab_size))
    try:
        calls = tuple(
            replace(call, arguments=whole_arguments(call.arguments)) for call in message.calls
        )
    except (TypeError, ValueError, RecursionError):
        raise PromptError("the arguments of a call have to be a JSON object") from None
    return replace(message, calls=calls) if calls else message


def _call(call: Any) -> ToolCall:
    match call:
        case {"id": str(id), "function": {"name": str(name), "arguments": str(arguments)}}:
            return ToolCall(id, name, arguments)
    raise PromptError('a call is {"id": ..., "function": {"name": ..., "arguments": "{...}"}}')
