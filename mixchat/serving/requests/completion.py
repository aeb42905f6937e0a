"""OpenAI's /v1/completions: a body becomes requests. All other fields are a chat's.

| field        | taken as                                 |
| ------------ | ---------------------------------------- |
| prompt       | a string, token ids, or a list of either |
| logprobs     | as top_logprobs of a chat                |
| echo, suffix | only false and empty                     |
| best_of      | only if it equals n                      |
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated, Any

from mixchat.base.option import Integer
from mixchat.face.request import Request
from mixchat.serving.requests.chat import OpenAIFields, TopLogprobs, read_openai
from mixchat.serving.requests.errors import field_error, value_error
from mixchat.serving.requests.fields import JSON, checked, only
from mixchat.serving.requests.shared import APIRequest, api_request, max_answers

if TYPE_CHECKING:
    from mixchat.face.model import Model

_PROMPT = "a string, a list of strings, or token ids"
_NO_ECHO = "has to be false: only new text is sent"


class _CompletionFields(OpenAIFields):
    logprobs: TopLogprobs = None
    echo: Annotated[bool, only((False,), "unsupported_value", _NO_ECHO)] = False
    suffix: Annotated[str, only(("",), "unsupported_parameter", "is not supported")] = ""
    best_of: Any = None
    prompt: Any


def read_completion(body: JSON, model: Model, strict: bool, at_end: ExitStack) -> APIRequest:
    """Return the requests of a body, as `read_chat` does. Raises `RequestError`, `PromptError`."""
    fields, sampling, ignored = read_openai(_CompletionFields, body, model, strict)
    if fields.best_of not in (None, fields.n):
        raise field_error("best_of", "has to equal n", "unsupported_value")
    prompts = {"prompt": fields.prompt}
    limit = max_answers(model)
    if isinstance(fields.prompt, list) and fields.prompt and type(fields.prompt[0]) is not int:
        if len(fields.prompt) * fields.n > limit:
            raise field_error("prompt", f"and n ask for more than {limit} answers", "invalid_value")
        prompts = {f"prompt[{number}]": each for number, each in enumerate(fields.prompt)}
    elif fields.prompt == []:
        raise value_error("prompt", _PROMPT, fields.prompt)
    texts = [
        token_ids(prompt, model.tokenizer.vocab_size, path) if isinstance(prompt, list) else prompt
        for path, prompt in prompts.items()
    ]
    for path, text in zip(prompts, texts, strict=True):
        if not isinstance(text, str | list):
            raise value_error(path, _PROMPT, text)
    requests = [
        Request(
            prompt=text,
            sampling=sampling,
            max_tokens=fields.length(),
            stop=tuple(fields.stop),
            form=fields.form(),
            top_logprobs=fields.logprobs,
        )
        for text in texts
    ]
    return api_request(
        model,
        requests,
        at_end,
        n=fields.n,
        stream=fields.stream,
        include_usage=fields.stream_options.include_usage,
        ignored=ignored,
    )


def token_ids(items: list[Any], vocab_size: int, path: str) -> list[int]:
    """Return the items as token ids. Raises `RequestError`."""
    token_id = Integer("A token id.", least=0, most=vocab_size - 1)
    return [checked(item, token_id, f"{path}[{i}]") for i, item in enumerate(items)]
