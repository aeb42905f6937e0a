"""The fields that chat and completion share: sampling, lengths, stop strings, how to send.

| field                                          | taken as                                  |
| ---------------------------------------------- | ----------------------------------------- |
| temperature, top_p, seed                       | OpenAI's; without one, the model's advice |
| top_k, min_p, repeat_penalty                   | mixchat's own, with the limits of `run`   |
| presence_penalty, frequency_penalty            | OpenAI's                                  |
| logit_bias                                     | by token id, -100 to 100                  |
| max_tokens                                     | 0: as many as fit                         |
| n                                              | OpenAI's, up to what the server can take  |
| stop, stream, stream_options.include_usage     | OpenAI's                                  |
| model                                          | the one that is served, or not given      |
| user, metadata, service_tier, prompt_cache_key | ignored: they change no answer            |
| safety_identifier, store: false                | ignored                                   |
| repetition_penalty                             | as repeat_penalty, the name of llama.cpp  |
| _FOREIGN, of other servers                     | ignored and named; refused if strict      |
| all others                                     | refused by their names                    |
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mixchat.base.context import Context
from mixchat.base.options import SamplingOptions
from mixchat.chat.parameters import LENGTHS, SAMPLING, NumberParameter
from mixchat.serving.requests.errors import RequestError
from mixchat.serving.requests.fields import Fields, checked_number
from mixchat.serving.service import Job, Service

_MOST_ANSWERS = 16  # of one request
MOST_LOGPROBS = 20
_MOST_STOPS, _LONGEST_STOP = 32, 500
_IGNORED = ("user", "metadata", "service_tier", "prompt_cache_key", "safety_identifier")
# Fields of other servers that only tune an answer, each with the value that holds here anyway.
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
_BIAS = NumberParameter("logit_bias", float, lambda x: -100 <= x <= 100, "between -100 and 100")
_PENALTY = NumberParameter("penalty", float, lambda x: -2 <= x <= 2, "between -2 and 2")
TOP_LOGPROBS = NumberParameter(
    "top_logprobs", int, lambda x: 0 <= x <= MOST_LOGPROBS, f"between 0 and {MOST_LOGPROBS}"
)


@dataclass(frozen=True)
class Defaults:
    """The advice of the model's makers, and how requests are read.

    max_tokens: 0 for what fits, None without advice; strict: refuse other servers' fields.
    """

    sampling: SamplingOptions
    max_tokens: int | None = None
    strict: bool = True


@dataclass(frozen=True)
class ParsedRequest:
    """A request that was read: a job for each answer, `n` for each prompt, and how to send them.

    ignored: the fields without an effect, which the client should know of.
    """

    jobs: tuple[Job, ...]
    n: int
    seed: int
    stream: bool
    include_usage: bool
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class Options:
    """The shared fields of one request."""

    sampling: SamplingOptions
    seed: int
    max_tokens: int | None
    stop: tuple[str, ...]
    n: int
    stream: bool
    include_usage: bool
    ignored: tuple[str, ...] = ()

    def asked(self, prompts: Sequence[Sequence[int]], **about: Any) -> ParsedRequest:
        """Return the request with `n` jobs for each prompt, each with a seed of its own.

        `about` are the fields of `Job` that are not options.
        """
        jobs = tuple(
            Job(
                prompt_ids=tuple(ids),
                sampling=dataclasses.replace(self.sampling, seed=(self.seed + i) % 2**63),
                max_tokens=self.max_tokens,
                stop=self.stop,
                **about,
            )
            for ids in prompts
            for i in range(self.n)
        )
        return ParsedRequest(jobs, self.n, self.seed, self.stream, self.include_usage, self.ignored)


def most_answers(service: Service) -> int:
    """Return how many answers a request may have: one that a service never takes is wrong."""
    return min(_MOST_ANSWERS, service.most_jobs)


def read_options(fields: Fields, service: Service, defaults: Defaults) -> Options:
    """Take the shared fields. Raises `RequestError` for what cannot be used."""
    most = most_answers(service)
    count = NumberParameter("n", int, lambda x: 1 <= x <= most, f"between 1 and {most}")
    _check_model(fields, service.name)
    fields.ignore(*_IGNORED)
    if fields.flag("store"):
        fields.refuse("store", "has to be false: answers are not stored", "unsupported_value")
    ignored = () if defaults.strict else _take_foreign(fields)
    seed = fields.number("seed", SAMPLING["seed"])
    stream_options = fields.fields("stream_options") or Fields({})
    stream_options.ignore("include_obfuscation")
    options = Options(
        sampling=_sampling(fields, defaults.sampling, service.tokenizer.vocab_size),
        seed=secrets.randbelow(2**32) if seed is None else seed,
        max_tokens=_max_tokens(fields, defaults, service.context),
        stop=_stop(fields),
        n=fields.number("n", count) or 1,
        stream=fields.flag("stream"),
        include_usage=stream_options.flag("include_usage"),
        ignored=ignored,
    )
    stream_options.end()
    return options


def _check_model(fields: Fields, model: str) -> None:
    name = fields.text("model")
    if name not in (None, model):
        raise RequestError(
            f"there is no model {name!a:.80} here; this server has {model!r}",
            status=404,
            param="model",
            code="model_not_found",
        )


def _take_foreign(fields: Fields) -> tuple[str, ...]:
    """Take the fields of other servers; return the names of those without an effect."""
    fields.rename("repetition_penalty", "repeat_penalty", SAMPLING["repeat-penalty"])
    return tuple(name for name, value in _FOREIGN.items() if fields.is_given(name, value))


def _sampling(fields: Fields, advised: SamplingOptions, vocab_size: int) -> SamplingOptions:
    numbers = {of.field: of for of in SAMPLING.values() if of.field != "seed"}
    numbers |= {"presence_penalty": _PENALTY, "frequency_penalty": _PENALTY}
    given = {name: fields.number(name, limits) for name, limits in numbers.items()}
    chosen = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(advised, **chosen, logit_bias=_logit_bias(fields, vocab_size))


def _logit_bias(fields: Fields, vocab_size: int) -> tuple[tuple[int, float], ...]:
    given = fields.fields("logit_bias")
    if given is None:
        return ()
    pairs: dict[int, float] = {}
    for name, value in given.named_items().items():
        token = int(name) if name.isascii() and name.isdigit() and len(name) < 10 else vocab_size
        if token >= vocab_size:
            given.refuse(name, f"is no token: ids are 0 to {vocab_size - 1}", "invalid_value")
        pairs[token] = float(checked_number(value, _BIAS, given.where(name)))
    return tuple(pairs.items())


def _max_tokens(fields: Fields, defaults: Defaults, context: Context) -> int | None:
    old, new = (
        fields.number(name, LENGTHS["max-tokens"])
        for name in ("max_tokens", "max_completion_tokens")
    )
    if old is not None and new is not None and old != new:
        fields.refuse("max_tokens", "and max_completion_tokens differ: give one of them")
    given = old if new is None else new
    if given is None:
        given = defaults.max_tokens
    if given is None:
        given = context.usual_answer
    return min(given, context.tokens) or None


def _stop(fields: Fields) -> tuple[str, ...]:
    value = fields.take("stop")
    texts = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        fields.wrong("stop", "a string or a list of strings", value)
    if len(texts) > _MOST_STOPS or any(len(text) > _LONGEST_STOP for text in texts):
        most = f"{_MOST_STOPS} strings of {_LONGEST_STOP} characters"
        fields.refuse("stop", f"takes at most {most}", "invalid_value")
    return tuple(text for text in texts if text)
