"""Checks the values that a Python program gives, before anything is loaded or computed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any, cast, get_args

from mixchat.base.errors import PromptError, UsageError, alternatives
from mixchat.base.options import CacheBits, LoadOptions, Overflow, SamplingOptions
from mixchat.base.quantities import MemoryBudget
from mixchat.experts.cache import POLICIES
from mixchat.face.numbers import BIAS, LENGTHS, PENALTIES, SAMPLING, TOP_LOGPROBS
from mixchat.face.request import Request, ToolOffer
from mixchat.text.messages import Message, Role
from mixchat.text.tool_call import ToolCall, whole_arguments

_NOT_LISTS = (str, bytes, Mapping)


def _is(kind: Any) -> Any:
    return lambda value: isinstance(value, kind)


def _is_list(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, _NOT_LISTS)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(text, str) for text in value)


def _require(is_usable: bool, name: str, rule: str, value: object) -> None:
    if not is_usable:
        raise UsageError(f"{name} has to be {rule}, not {value!r:.80}")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1


# The test of a value, and the rule that a message names, by the option of `mixchat.load`.
_LOAD_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "expert_memory": (_is(str), 'a text such as "8GB" or "50%"'),
    "device_memory": (_is(str), 'a text such as "12GB" or "12GB,8GB"'),
    "context_size": (_is_count, "1 or more"),
    "least_context": (lambda value: value == 0 or _is_count(value), "0 or more"),
    "kv_bits": (lambda value: type(value) is int and value in get_args(CacheBits), "8 or 16"),
    "exact_prompts": (_is(bool), "True or False"),
    "parallel": (_is_count, "1 or more"),
    "speculation": (_is(bool), "True or False"),
    "device": (_is(str), 'a text such as "cpu" or "cuda:0"'),
    "cache_policy": (lambda value: value in [*POLICIES], alternatives([*POLICIES])),
    "trace": (_is(str | Path), "the path of a file"),
    "workers": (lambda value: _is_list(value) and all(map(_is(str), value)), "a list of texts"),
    "key_file": (_is(str | Path), "the path of a file"),
}
_LOAD_READERS: dict[str, Callable[[Any], Any]] = {
    "expert_memory": MemoryBudget.parse,
    "device_memory": MemoryBudget.parse_list,
    "workers": tuple,
    "trace": Path,
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


def checked_request(request: Request, vocab_size: int, variables: Collection[str]) -> Request:
    """Return a request whose values can be used, with each of its messages as a `Message`.

    variables: of the model's template. Raises `UsageError`, and `PromptError` for a message.
    """
    _require(isinstance(request, Request), "the request", "a Request", request)
    for name, is_usable, rule in (
        ("sampling", _is(SamplingOptions | None), "SamplingOptions"),
        ("stop", _are_texts, "a string or a list of strings"),
        ("overflow", lambda value: value in get_args(Overflow), '"stop" or "drop-oldest"'),
        ("think", _is(bool | None), "True, False or None"),
        ("variables", _is(Mapping), "a dict"),
        ("tools", _is(ToolOffer | None), "a list of functions in OpenAI's form"),
        ("messages", _is_list, "a list of messages"),
        ("prompt", lambda value: _is(str | None)(value) or _is_list(value), "a text or token ids"),
    ):
        _require(is_usable(getattr(request, name)), name, rule, getattr(request, name))
    if request.sampling is not None:
        _check_sampling(request.sampling, vocab_size)
    for number in (LENGTHS["max-tokens"], TOP_LOGPROBS):
        if (value := getattr(request, number.field)) is not None:
            number.check(number.field, value)
    for name, value in request.variables.items():
        if name not in variables:
            hint = f"It has {', '.join(variables) or 'none'}."
            raise UsageError(f"the chat template has no variable {name!r}", hint=hint)
        _require(_is(str | int | float | None)(value), name, "a text or a number", value)
    prompt = request.prompt
    if prompt is not None and not isinstance(prompt, str):
        # Arrays and tensors give numbers of Python's.
        prompt = tuple(prompt.tolist() if hasattr(prompt, "tolist") else prompt)
        _check_tokens(prompt, vocab_size)
    messages = tuple(_message(message, vocab_size) for message in request.messages)
    return replace(request, messages=messages, prompt=prompt)


def _check_sampling(sampling: Any, vocab_size: int) -> None:
    for number in (*SAMPLING.values(), *PENALTIES):
        value = getattr(sampling, number.field)
        if value is not None or number.field != "seed":
            number.check(number.field, value)
    biases = sampling.logit_bias
    is_usable = _is_list(biases) and all(_is_list(pair) and len(pair) == 2 for pair in biases)
    _require(is_usable, "logit_bias", "numbers by token id", biases)
    _check_tokens([token for token, _ in biases], vocab_size)
    for _, bias in biases:
        BIAS.check("logit_bias", bias)


def _check_tokens(ids: Iterable[Any], vocab_size: int) -> None:
    for token in ids:
        is_number = type(token) is int or isinstance(token, Integral)
        if not is_number or not 0 <= int(token) < vocab_size:
            raise UsageError(f"token ids are 0 to {vocab_size - 1}, not {token!r:.80}")


def _message(message: Any, vocab_size: int) -> Message:
    if isinstance(message, Mapping):
        role, content = message.get("role"), message.get("content")
        tool_calls = message.get("tool_calls") or ()
        calls = tuple(map(_call, tool_calls if _is_list(tool_calls) else [tool_calls]))
        if calls and content is None:  # as OpenAI's answers with calls have it
            content = ""
        call_id = str(message.get("tool_call_id") or "")
        message = Message(cast("Role", role), cast("str", content), calls=calls, call_id=call_id)
    is_message = isinstance(message, Message) and message.role in get_args(Role)
    if not is_message or not isinstance(message.content, str):
        raise PromptError("a message needs a role (system, user, assistant, tool) and its content")
    assert isinstance(message, Message)
    _check_tokens(message.ids or (), vocab_size)
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
