"""The body of a completion, turned into jobs.

| field        | taken as                                 |
| ------------ | ---------------------------------------- |
| prompt       | a string, token ids, or a list of either |
| logprobs     | at most 20                               |
| echo, suffix | only false and empty                     |
| best_of      | only if it equals n                      |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

from mixchat.base.errors import PromptError
from mixchat.chat.parameters import NumberParameter
from mixchat.serving.requests.errors import field_error, value_error
from mixchat.serving.requests.fields import checked_number, number, only
from mixchat.serving.requests.forms import constraint_of
from mixchat.serving.requests.options import (
    TOP_LOGPROBS,
    LoadedModel,
    ParsedRequest,
    SharedFields,
    max_answers,
    parsed,
    read_fields,
)
from mixchat.serving.service import Service
from mixchat.text.messages import Message
from mixchat.text.template import CompletionTemplate

_PROMPT = "a string, a list of strings, or token ids"
_NO_ECHO = "has to be false: only new text is sent"


class _CompletionFields(SharedFields):
    logprobs: Annotated[int | None, number(TOP_LOGPROBS)] = None
    echo: Annotated[bool, only((False,), "unsupported_value", _NO_ECHO)] = False
    suffix: Annotated[str, only(("",), "unsupported_parameter", "is not supported")] = ""
    best_of: Any = None
    prompt: Any


def read_completion(
    body: dict[str, Any], model: LoadedModel, unused: Sequence[str] = ()
) -> ParsedRequest:
    """Return the jobs of a body, as `read_chat` does. Raises `RequestError` and `PromptError`."""
    fields, job, ignored = read_fields(_CompletionFields, body, model, unused)
    if fields.best_of not in (None, fields.n):
        raise field_error("best_of", "has to equal n", "unsupported_value")
    service = model.service
    limit = max_answers(service)
    given = _prompts(fields.prompt, limit)
    constraint = constraint_of(fields, model.compile_form, (), True)
    if len(given) * fields.n > limit:
        raise field_error("prompt", f"and n ask for more than {limit} answers", "invalid_value")
    job = replace(job, top_logprobs=fields.logprobs, constraint=constraint, continues_prompt=True)
    prompts = [_encoded(prompt, path, service) for path, prompt in given.items()]
    return parsed(fields, job, prompts, ignored)


def token_ids(items: list[Any], vocab_size: int, path: str) -> list[int]:
    """Return the items as token ids. Raises `RequestError`."""
    limits = NumberParameter(
        "token", int, lambda x: 0 <= x < vocab_size, f"a token id, 0 to {vocab_size - 1}"
    )
    return [checked_number(item, limits, f"{path}[{i}]") for i, item in enumerate(items)]


def _prompts(given: Any, limit: int) -> dict[str, str | list[Any]]:
    if isinstance(given, str):
        return {"prompt": given}
    if not isinstance(given, list) or not given:
        raise value_error("prompt", _PROMPT, given)
    if isinstance(given[0], int):
        return {"prompt": given}
    if len(given) > limit:
        raise field_error("prompt", f"has {len(given)} items; at most {limit} are taken")
    prompts = {f"prompt[{i}]": item for i, item in enumerate(given)}
    for path, prompt in prompts.items():
        if not isinstance(prompt, str | list):
            raise value_error(path, _PROMPT, prompt)
    return prompts


def _encoded(prompt: str | list[Any], path: str, service: Service) -> list[int]:
    tokenizer = service.tokenizer
    if isinstance(prompt, list):
        ids = token_ids(prompt, tokenizer.vocab_size, path)
    else:
        service.context.check_text(prompt, "the prompt")
        template = CompletionTemplate(tokenizer, add_bos=tokenizer.adds_bos)
        ids = template.encode([Message("user", prompt)])
    if not ids:
        raise PromptError("the prompt is empty")
    return ids
