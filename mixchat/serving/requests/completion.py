"""The body of a completion, turned into jobs.

| field           | taken as                                                               |
| --------------- | ---------------------------------------------------------------------- |
| prompt          | a string, a list of strings, token ids, or a list of lists of them     |
| logprobs        | at most 20                                                             |
| echo, suffix    | refused, unless they are false and empty                               |
| best_of         | only where it equals n                                                 |
"""

from __future__ import annotations

from typing import Any

from mixchat.base.errors import PromptError
from mixchat.chat.parameters import NumberParameter
from mixchat.serving.requests.fields import Fields, checked_number, refuse, refuse_value
from mixchat.serving.requests.forms import Compile, read_response_format
from mixchat.serving.requests.options import (
    TOP_LOGPROBS,
    Defaults,
    ParsedRequest,
    most_answers,
    read_options,
)
from mixchat.serving.service import Service
from mixchat.text.messages import Message
from mixchat.text.template import CompletionTemplate

_FORMS = "a string, a list of strings, or token ids"


def read_completion(
    body: dict[str, Any], service: Service, defaults: Defaults, compile_form: Compile
) -> ParsedRequest:
    """Return what a body asks for. Raises `RequestError`, and `PromptError` for a bad prompt."""
    fields = Fields(body)
    options = read_options(fields, service, defaults)
    top_logprobs = fields.number("logprobs", TOP_LOGPROBS)
    _refuse_what_is_not_supported(fields, options.n)
    most = most_answers(service)
    given = _prompts(fields.take("prompt"), most)
    constraint = read_response_format(fields, compile_form, continued=True)
    fields.end()
    if len(given) * options.n > most:
        refuse("prompt", f"and n ask for more than {most} answers", "invalid_value")
    return options.asked(
        [_encoded(prompt, path, service) for prompt, path in given],
        stop_ids=service.template.stop_ids,
        top_logprobs=top_logprobs,
        constraint=constraint,
        continues_prompt=True,
    )


def token_ids(items: list[Any], vocab_size: int, path: str) -> list[int]:
    """Return the items, if all are ids of tokens. Raises `RequestError`."""
    limits = NumberParameter(
        "token", int, lambda x: 0 <= x < vocab_size, f"a token id, 0 to {vocab_size - 1}"
    )
    return [checked_number(item, limits, f"{path}[{i}]") for i, item in enumerate(items)]


def _refuse_what_is_not_supported(fields: Fields, n: int) -> None:
    if fields.flag("echo"):
        fields.refuse("echo", "has to be false: only what is new is sent", "unsupported_value")
    if fields.text("suffix"):
        fields.refuse("suffix", "is not supported", "unsupported_parameter")
    if fields.take("best_of") not in (None, n):
        fields.refuse("best_of", "has to equal n", "unsupported_value")


def _prompts(value: Any, most: int) -> list[tuple[str | list[Any], str]]:
    """Return each prompt with its path, at most `most` of them: a text, or a list that should hold
    token ids."""
    if value is None:
        refuse("prompt", "is missing", "missing_required_parameter")
    if isinstance(value, str):
        return [(value, "prompt")]
    if not isinstance(value, list) or not value:
        refuse_value("prompt", _FORMS, value)
    if isinstance(value[0], int):
        return [(value, "prompt")]
    if len(value) > most:
        refuse("prompt", f"has {len(value)} items; at most {most} are taken")
    return [(_text_or_ids(item, f"prompt[{i}]"), f"prompt[{i}]") for i, item in enumerate(value)]


def _text_or_ids(value: Any, path: str) -> str | list[Any]:
    if not isinstance(value, str | list):
        refuse_value(path, _FORMS, value)
    return value


def _encoded(prompt: str | list[Any], path: str, service: Service) -> list[int]:
    tokenizer = service.tokenizer
    if isinstance(prompt, list):
        ids = token_ids(prompt, tokenizer.vocab_size, path)
    else:
        service.context.check_text(prompt, "the prompt")
        plain = CompletionTemplate(tokenizer, add_bos=tokenizer.adds_bos)
        ids = plain.encode([Message("user", prompt)])
    if not ids:
        raise PromptError("the prompt is empty")
    return ids
