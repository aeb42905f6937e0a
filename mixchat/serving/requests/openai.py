"""OpenAI's /v1/completions: a body becomes requests. It and chats share `OpenAIFields`.

| field        | taken as                                 |
| ------------ | ---------------------------------------- |
| prompt       | a string, token ids, or a list of either |
| logprobs     | as top_logprobs of a chat                |
| echo, suffix | only false and empty                     |
| best_of      | only if it equals n                      |
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field, ValidationInfo, field_validator

from mixchat.base.option import Integer
from mixchat.face.request import Form, Request
from mixchat.serving.requests import shared
from mixchat.serving.requests.errors import field_error, value_error
from mixchat.serving.requests.fields import (
    JSON,
    RequestObject,
    checked,
    only,
    validated,
    within,
    wrong,
)
from mixchat.serving.requests.shared import APIRequest, api_request, max_answers

if TYPE_CHECKING:
    from mixchat.base.options import SamplingOptions
    from mixchat.face.model import Model

MAX_LOGPROBS = 20
# Other servers' fields that only tune an answer, with the values that apply here.
FOREIGN = {
    "cache_prompt": True,
    "chat_template_kwargs": {},
    "keep_alive": None,
    "num_ctx": None,
    "options": {},
    "reasoning_effort": "none",
    "think": False,
    "verbosity": None,
}
_PENALTY = "repetition_penalty"  # of vLLM and Hugging Face
_PROMPT = "a string, a list of strings, or token ids"
_NO_ECHO = "has to be false: only new text is sent"
# A server holds these for each token until a client takes them.
TopLogprobs = Annotated[
    int | None, within(replace(shared.OPTIONS["top_logprobs"], most=MAX_LOGPROBS))
]


class _JSONSchema(RequestObject):
    ignored = ("name", "description")
    strict: bool = False  # every schema is followed to the letter
    schema_: Annotated[shared.Schema, Field(alias="schema")]


class _ResponseFormat(RequestObject):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JSONSchema | None = Field(None, validate_default=True)
    schema_: Annotated[shared.Schema | None, Field(alias="schema")] = None  # llama.cpp's place

    @field_validator("schema_", mode="before")
    @classmethod
    def _belongs_to_objects(cls, schema: Any, info: ValidationInfo) -> Any:
        if schema is not None and info.data.get("type") != "json_object":
            raise wrong("unknown_parameter", "belongs to the type json_object alone")
        return schema

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
        if format.json_schema is not None:
            return format.json_schema.schema_
        return {"type": "object"} if format.schema_ is None else format.schema_

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
            name for name, usual in FOREIGN.items() if body.get(name) not in (None, [], usual)
        )
        body = {name: value for name, value in body.items() if name not in FOREIGN}
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
