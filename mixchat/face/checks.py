"""Checks the values that a Python program gives, before anything is loaded or computed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any, cast, get_args

from mixchat.base.errors import PromptError, UsageError, short_repr
from mixchat.base.options import CacheBits, LoadOptions, Overflow, SamplingOptions
from mixchat.base.quantities import MemoryBudget
from mixchat.face.numbers import BIAS, LENGTHS, PENALTIES, SAMPLING, TOP_LOGPROBS
from mixchat.face.request import Request, ToolOffer
from mixchat.text.messages import Message, Role
from mixchat.text.tool_call import ToolCall, whole_arguments

_NOT_LISTS = (str, bytes, Mapping)


def _is(kind: Any) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind)


def _is_list(value: Any) -> bool:
    has_items = isinstance(value, Iterable) and getattr(value, "ndim", 1) > 0
    return has_items and not isinstance(value, _NOT_LISTS)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(text, str) for text in value)


def _require(is_usable: bool, name: str, rule: str, value: object) -> None:
    if not is_usable:
        raise UsageError(f"{name} has to be {rule}, not {short_repr(value)}")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_word(*words: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in words


# The test of a value, and the rule that a message names, by the option of `mixchat.load`.
_LOAD_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "expert_memory": (_is(str), 'a text such as "8GB" or "50%"'),
    "device_memory": (_is(str), 'a text such as "12GB" or "12GB,8GB"'),
    "context_size": (_is_count, "1 or more"),
    "least_context": (lambda value: type(value) is int and value >= 0, "0 or more"),
    "kv_bits": (lambda value: type(value) is int and value in get_args(CacheBits), "8 or 16"),
    "exact_prompts": (_is(bool), "True or False"),
    "parallel": (_is_count, "1 or more"),
    "speculation": (_is(bool), "True or False"),
    "device": (_is(str), 'a text such as "cpu" or "cuda:0"'),
    "workers": (lambda value: _is_list(value) and all(map(_is(str), value)), "a list of texts"),
    "key_file": (_is(str | Path), "the path of a file"),
}
_LOAD_READERS: dict[str, Callable[[Any], Any]] = {
    "expert_memory": MemoryBudget.parse,
    "device_memory": MemoryBudget.parse_list,
    "workers": tuple,
    "key_file": Path,
}


def checked_load_options(options: Mapping[str, Any]) -> LoadOptions:
    """Return the options of `mixchat.load`. None counts as not given. Raises `UsageError`."""
    options = {name: value for name, value in options.items() if value is not None}
    for name, value in options.items():
        if name not in _LOAD_RULES:
            hint = f"The options are {', '.join(sorted(_LOAD_RULES))}."
            raise UsageError(f"there is no option {name!r}", hint=hint)
        is_usable, rule = _LOAD_RULES[name]
        _require(is_usable(value), name, rule, value)
    read = {name: _LOAD_READERS.get(name, lambda same: same)(options[name]) for name in options}
    read.setdefault("exact_prompts", read.get("parallel", 1) > 1)
    return LoadOptions(host_memory=read.pop("expert_memory", None), **read)


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
        ("stop", _are_texts, "a string or a list of strings"),
        ("overflow", _is_word(*get_args(Overflow)), '"stop" or "drop-oldest"'),
        ("think", _is(bool | None), "True, False or None"),
        ("variables", _is(Mapping), "a dict"),
        ("tools", _is(ToolOffer | None), "a list of functions in OpenAI's form"),
        ("messages", _is_list, "a list of messages"),
        ("prompt", lambda value: _is(str | None)(value) or _is_list(value), "a text or token ids"),
    ):
        _require(is_usable(getattr(request, name)), name, rule, getattr(request, name))
    numbers = {
        number.field: number.checked(number.field, value)
        for number in (LENGTHS["max-tokens"], TOP_LOGPROBS)
        if (value := getattr(request, number.field)) is not None
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
    changed: Any = {"messages": messages, "prompt": prompt, "sampling": sampling, **numbers}
    return replace(request, **changed)


def _sampling(
    chosen: SamplingOptions | Mapping[str, Any], advised: SamplingOptions, vocab_size: int
) -> SamplingOptions:
    values = vars(chosen) if isinstance(chosen, SamplingOptions) else chosen
    numbers = {number.field: number for number in (*SAMPLING.values(), *PENALTIES)}
    usable: dict[str, Any] = {}
    for name, value in values.items():
        if name == BIAS.field:
            usable[name] = _biases(value, vocab_size)
        elif name not in numbers:
            raise UsageError(f"there is no option {short_repr(name)} of sampling")
        elif value is not None or name != "seed":
            usable[name] = numbers[name].checked(name, value)
    return replace(advised, **usable)


def _biases(biases: Any, vocab_size: int) -> tuple[tuple[int, float], ...]:
    pairs = list(biases.items()) if isinstance(biases, Mapping) else biases
    is_usable = _is_list(pairs) and all(_is_list(pair) and len(pair) == 2 for pair in pairs)
    _require(is_usable, BIAS.field, "numbers by token id", biases)
    tokens = _token_ids([token for token, _ in pairs], vocab_size)
    amounts = [float(BIAS.checked(BIAS.field, amount)) for _, amount in pairs]
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
    has_role = isinstance(message, Message) and _is_word(*get_args(Role))(message.role)
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
