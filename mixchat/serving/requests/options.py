"""The fields that chat and completion share.

| field                                      | taken as                                |
| ------------------------------------------ | --------------------------------------- |
| temperature, top_p, seed                   | OpenAI's, else the model's advice       |
| top_k, min_p, repeat_penalty               | mixchat's own, with the limits of `run` |
| presence_penalty, frequency_penalty        | OpenAI's                                |
| logit_bias                                 | by token id, -100 to 100                |
| max_tokens, max_completion_tokens          | 0 for as many as fit                    |
| n                                          | up to what the server can take          |
| stop, stream, stream_options.include_usage | OpenAI's                                |
| response_format, grammar                   | see forms.py                            |
| model                                      | the served one, if given                |
| user, metadata and other labels            | ignored                                 |
| store                                      | only false                              |
| repetition_penalty                         | as repeat_penalty                       |
| _FOREIGN                                   | ignored and named, or refused if strict |
| all others                                 | refused                                 |
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import Field, PlainValidator

from mixchat.base.model_config import Context
from mixchat.base.options import SamplingOptions
from mixchat.chat.parameters import LENGTHS, SAMPLING, NumberParameter
from mixchat.serving.requests.errors import RequestError, field_error, value_error
from mixchat.serving.requests.fields import (
    RequestObject,
    checked_number,
    number,
    only,
    validated,
    wrong,
)
from mixchat.serving.requests.forms import Compile, FormFields
from mixchat.serving.service import Job, Service
from mixchat.text.tokenizer import TokenTexts

LATEST = ":latest"  # which Ollama's clients add to a name
_MAX_ANSWERS = 16  # of one request
_MAX_LOGPROBS = 20
_MAX_STOPS, _MAX_STOP_LENGTH = 32, 500  # strings, characters
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
_SAMPLING_FIELDS = {"presence_penalty", "frequency_penalty"} | (
    {parameter.field for parameter in SAMPLING.values()} - {"seed"}
)
_FOREIGN_PENALTY = "repetition_penalty"
# The limit of OpenAI. `run --temp` has none.
_TEMPERATURE = NumberParameter("temperature", float, lambda x: 0 <= x <= 2, "between 0 and 2")
_BIAS = NumberParameter("logit_bias", float, lambda x: -100 <= x <= 100, "between -100 and 100")
_PENALTY = NumberParameter("penalty", float, lambda x: -2 <= x <= 2, "between -2 and 2")
TOP_LOGPROBS = NumberParameter(
    "top_logprobs", int, lambda x: 0 <= x <= _MAX_LOGPROBS, f"between 0 and {_MAX_LOGPROBS}"
)


@dataclass(frozen=True)
class Defaults:
    """The advice of the model's makers, and whether to refuse other servers' fields.

    `max_tokens` is 0 for as many as fit, and None without advice.
    """

    sampling: SamplingOptions
    max_tokens: int | None = None
    strict: bool = True


@dataclass(frozen=True)
class LoadedModel:
    """A service over a model, the defaults of its answers, and what compiles their forms."""

    service: Service
    defaults: Defaults
    compile_form: Compile

    @cached_property
    def texts(self) -> TokenTexts:
        return TokenTexts(self.service.tokenizer)


@dataclass(frozen=True)
class ParsedRequest:
    """The `n` jobs for each prompt of a request, and how to send their answers.

    `ignored` names the fields without an effect.
    """

    jobs: tuple[Job, ...]
    n: int
    seed: int
    stream: bool
    include_usage: bool
    ignored: tuple[str, ...] = ()


def _stop_strings(given: Any) -> tuple[str, ...]:
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise wrong("invalid_value", "has to be a string or a list of strings")
    if len(texts) > _MAX_STOPS or any(len(text) > _MAX_STOP_LENGTH for text in texts):
        limit = f"{_MAX_STOPS} strings of {_MAX_STOP_LENGTH} characters"
        raise wrong("invalid_value", f"takes at most {limit}")
    return tuple(text for text in texts if text)


class StreamOptions(RequestObject):
    """The field stream_options."""

    ignored = ("include_obfuscation",)
    include_usage: bool = False


class SharedFields(FormFields):
    """The fields that chat and completion share. A number that is not given is None."""

    ignored: ClassVar[tuple[str, ...]] = (
        "model",
        "user",
        "metadata",
        "service_tier",
        "prompt_cache_key",
        "safety_identifier",
    )
    store: Annotated[
        bool, only((False,), "unsupported_value", "has to be false: answers are not stored")
    ] = False
    seed: Annotated[int | None, number(SAMPLING["seed"])] = None
    temperature: Annotated[float | None, number(_TEMPERATURE)] = None
    top_p: Annotated[float | None, number(SAMPLING["top-p"])] = None
    top_k: Annotated[int | None, number(SAMPLING["top-k"])] = None
    min_p: Annotated[float | None, number(SAMPLING["min-p"])] = None
    repeat_penalty: Annotated[float | None, number(SAMPLING["repeat-penalty"])] = None
    presence_penalty: Annotated[float | None, number(_PENALTY)] = None
    frequency_penalty: Annotated[float | None, number(_PENALTY)] = None
    logit_bias: dict[str, Any] = Field({})
    max_tokens: Annotated[int | None, number(LENGTHS["max-tokens"])] = None
    max_completion_tokens: Annotated[int | None, number(LENGTHS["max-tokens"])] = None
    stop: Annotated[tuple[str, ...], PlainValidator(_stop_strings)] = ()
    n: int = 1
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()


_Fields = TypeVar("_Fields", bound=SharedFields)


def max_answers(service: Service) -> int:
    """Return how many answers a request may have."""
    return min(_MAX_ANSWERS, service.most_jobs)


def read_fields(
    kind: type[_Fields], body: dict[str, Any], model: LoadedModel, unused: Sequence[str]
) -> tuple[_Fields, Job, tuple[str, ...]]:
    """Return a body's fields, a job with its options, and the names of fields without an effect.

    `unused` are those of another API's body. Raises `RequestError` for the first wrong field.
    """
    service, defaults = model.service, model.defaults
    check_model(body.get("model"), service.name)
    ignored = tuple(unused)
    if not defaults.strict:
        body, foreign = _without_foreign(body)
        ignored = (*foreign, *unused)
    elif unused:
        raise field_error(unused[0], "has no effect here", "unknown_parameter")
    fields = validated(kind, body)
    limit = max_answers(service)
    if not 1 <= fields.n <= limit:
        raise value_error("n", f"between 1 and {limit}", fields.n)
    job = Job(
        prompt_ids=(),
        stop_ids=service.template.stop_ids,
        sampling=_sampling(fields, defaults.sampling, service.tokenizer.vocab_size),
        max_tokens=_max_tokens(fields, defaults, service.context),
        stop=fields.stop,
    )
    return fields, job, ignored


def parsed(
    fields: SharedFields, job: Job, prompts: Sequence[Sequence[int]], ignored: tuple[str, ...]
) -> ParsedRequest:
    """Return the request with `n` jobs for each prompt, each with its own seed."""
    seed = secrets.randbelow(2**32) if fields.seed is None else fields.seed
    jobs = tuple(
        replace(job, prompt_ids=tuple(ids), sampling=replace(job.sampling, seed=(seed + i) % 2**63))
        for ids in prompts
        for i in range(fields.n)
    )
    include_usage = fields.stream_options.include_usage
    return ParsedRequest(jobs, fields.n, seed, fields.stream, include_usage, ignored)


def check_model(given: object, served: str) -> None:
    """Raise `RequestError` if a request names another model than the served one."""
    if given is not None and not isinstance(given, str):
        raise value_error("model", "a string", given)
    if given is not None and given.removesuffix(LATEST) != served.removesuffix(LATEST):
        raise RequestError(
            f"there is no model {given!a:.80} here; this server has {served!r}",
            status=404,
            param="model",
            code="model_not_found",
        )


def _without_foreign(body: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    named = tuple(
        name for name, usual in _FOREIGN.items() if body.get(name) not in (None, [], usual)
    )
    body = {name: value for name, value in body.items() if name not in _FOREIGN}
    penalty = body.pop(_FOREIGN_PENALTY, None)
    if penalty is not None:
        checked_number(penalty, SAMPLING["repeat-penalty"], _FOREIGN_PENALTY)
        if body.get("repeat_penalty") not in (None, penalty):
            raise field_error(_FOREIGN_PENALTY, "and repeat_penalty differ: give one of them")
        body["repeat_penalty"] = penalty
    return body, named


def _sampling(fields: SharedFields, advised: SamplingOptions, vocab_size: int) -> SamplingOptions:
    given = fields.model_dump(include=_SAMPLING_FIELDS, exclude_none=True)
    bias = _logit_bias(fields.logit_bias, vocab_size)
    return replace(advised, **given, logit_bias=bias)


def _logit_bias(given: dict[str, Any], vocab_size: int) -> tuple[tuple[int, float], ...]:
    pairs: dict[int, float] = {}
    for name, value in given.items():
        path = f"logit_bias.{name}"
        token = int(name) if name.isascii() and name.isdigit() and len(name) < 10 else vocab_size
        if token >= vocab_size:
            raise field_error(path, f"is no token: ids are 0 to {vocab_size - 1}", "invalid_value")
        pairs[token] = float(checked_number(value, _BIAS, path))
    return tuple(pairs.items())


def _max_tokens(fields: SharedFields, defaults: Defaults, context: Context) -> int | None:
    old, new = fields.max_tokens, fields.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise field_error("max_tokens", "and max_completion_tokens differ: give one of them")
    for tokens in (new, old, defaults.max_tokens):
        if tokens is not None:
            return min(tokens, context.tokens) or None
    return min(context.usual_answer, context.tokens) or None
