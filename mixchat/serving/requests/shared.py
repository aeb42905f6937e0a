"""What bodies of all APIs have: numbers, stop strings, thinking and forms, made into requests."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, FailFast, PlainValidator

from mixchat.base.errors import PromptTooLongError
from mixchat.base.option import options_of
from mixchat.base.options import AnswerOptions, SamplingOptions
from mixchat.face.prompt import LEAVE_OUT_HINT
from mixchat.face.request import FormError, Request
from mixchat.serving.requests.errors import RequestError, field_error, value_error
from mixchat.serving.requests.fields import (
    RequestObject,
    checked,
    max_items,
    or_text,
    to_json,
    within,
    wrong,
)
from mixchat.text.thinking import EFFORT, EFFORTS, ThinkingFormat

if TYPE_CHECKING:
    from mixchat.face.model import Model
    from mixchat.face.prompt import Prompt

LATEST = ":latest"  # which Ollama's clients add to a name
MAX_MESSAGES = 10_000
MAX_PARTS = 1000  # of a message
_MAX_ANSWERS = 16  # of one request
_MAX_STOPS, _MAX_STOP_LENGTH = 32, 500  # strings, characters
_MAX_FORM = 100_000  # bytes of a schema or a grammar, which take 2 s
_HIGHER_EFFORTS = ("xhigh", "max")  # than any that templates know
_CODES = {"schema": "invalid_schema", "tools": "invalid_schema", "grammar": "invalid_grammar"}
OPTIONS = {**options_of(SamplingOptions), **options_of(AnswerOptions)}


def declared(name: str) -> PlainValidator:
    """Return a validator that takes a value of the option `name`, whatever the field's name is."""
    return within(OPTIONS[name])


Length = Annotated[int | None, declared("max_tokens")]


def _short(stop: str) -> str:
    if len(stop) > _MAX_STOP_LENGTH:
        raise wrong("invalid_value", f"has more than {_MAX_STOP_LENGTH} characters")
    return stop


def small_form(form: Any) -> Any:
    """Return a schema or a grammar, unless it has too many bytes."""
    size = len(form) if isinstance(form, str) else len(to_json(form))
    if size > _MAX_FORM:
        raise wrong(None, f"is too large: {_MAX_FORM} bytes are taken at most")
    return form


# An empty string would end each answer at once, so it is left out.
Stops = Annotated[
    list[Annotated[str, AfterValidator(_short)]],
    FailFast(),
    max_items(_MAX_STOPS),
    or_text(str),
    AfterValidator(lambda stops: list(filter(None, stops))),
]
Schema = Annotated[dict[str, Any], AfterValidator(small_form)]
Grammar = Annotated[str, AfterValidator(small_form)]


class SamplingFields(RequestObject):
    """The numbers of OpenAI's, llama.cpp's and Ollama's requests. None if one is not given."""

    seed: Annotated[Any, declared("seed")] = None
    temperature: Annotated[Any, declared("temperature")] = None
    top_p: Annotated[Any, declared("top_p")] = None
    top_k: Annotated[Any, declared("top_k")] = None
    min_p: Annotated[Any, declared("min_p")] = None
    repeat_penalty: Annotated[Any, declared("repeat_penalty")] = None
    presence_penalty: Annotated[Any, declared("presence_penalty")] = None
    frequency_penalty: Annotated[Any, declared("frequency_penalty")] = None


def sampling_of(
    model: Model, fields: RequestObject, logit_bias: Mapping[str, Any] = MappingProxyType({})
) -> SamplingOptions:
    """Return the sampling of a body that has some of `SamplingFields`, else the model's advice.

    logit_bias: what is added to logits, by token id. Raises `RequestError` for a bad one.
    """
    numbers = fields.model_dump(include={*SamplingFields.model_fields}, exclude_none=True)
    pairs: dict[int, float] = {}
    size = model.tokenizer.vocab_size
    for name, value in logit_bias.items():
        path = f"logit_bias.{name}"
        token = int(name) if name.isascii() and name.isdigit() and len(name) < 10 else size
        if token >= size:
            raise field_error(path, f"is no token: ids are 0 to {size - 1}", "invalid_value")
        pairs[token] = checked(value, OPTIONS["logit_bias"], path)
    return replace(model.sampling, **numbers, logit_bias=tuple(pairs.items()))


def thinking_variables(
    format: ThinkingFormat | None, think: bool | None, effort: object
) -> tuple[dict[str, Any], set[str]]:
    """Return variables of the model's template, and which of "think" and "effort" have an effect.

    effort: one of the template's, a higher one, or "none". Other values have no effect, because
    they could put control tokens into the prompt.
    """
    variables: dict[str, Any] = {}
    used = set[str]()
    if format is None:
        return variables, used
    effort = EFFORTS[-1] if effort in _HIGHER_EFFORTS else effort
    if format.switch is not None and think is not None:
        variables[format.switch] = think
        used.add("think")
    elif EFFORT in format.variables and think:
        used.add("think")  # a model with efforts always thinks
    if EFFORT in format.variables and effort in EFFORTS:
        variables[EFFORT] = effort
        used.add("effort")
    elif format.switch is not None and effort == "none":
        variables[format.switch] = False
        used.add("effort")
    return variables, used


def check_model(name: object, served: str) -> None:
    """Raise `RequestError` if a request names another model than the served one."""
    if name is not None and not isinstance(name, str):
        raise value_error("model", "a string", name)
    if name is not None and name.removesuffix(LATEST) != served.removesuffix(LATEST):
        raise RequestError(
            f"there is no model {name!a:.80} here; this server has {served!r}",
            status=404,
            param="model",
            code="model_not_found",
        )


def check_unused(names: Sequence[str], strict: bool) -> tuple[str, ...]:
    """Return the fields without an effect. Raises `RequestError` for them if `strict`."""
    if strict and names:
        raise field_error(names[0], "has no effect here", "unknown_parameter")
    return tuple(names)


def max_answers(model: Model) -> int:
    """Return how many answers a body may ask for."""
    return min(_MAX_ANSWERS, model.capacity)


@dataclass(frozen=True)
class APIRequest:
    """What a body asks: `n` answers to each prompt, and how to send them.

    requests, prompts: one for each answer, in the order of the answers. ignored: the fields without
    an effect.
    """

    requests: tuple[Request, ...]
    prompts: tuple[Prompt, ...]
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    ignored: tuple[str, ...] = ()

    @property
    def sampling(self) -> SamplingOptions:
        """Return the sampling of the first answer, whose seed is given or drawn."""
        sampling = self.requests[0].sampling
        assert isinstance(sampling, SamplingOptions)
        return sampling


def api_request(
    model: Model,
    requests: Sequence[Request],
    at_end: ExitStack,
    *,
    form_field: str = "response_format",
    n: int = 1,
    stream: bool = False,
    include_usage: bool = False,
    ignored: tuple[str, ...] = (),
) -> APIRequest:
    """Make the prompts, and give each answer a seed of its own.

    This takes seconds for a long conversation. `at_end` ends the check of a form if it is closed.
    form_field: the API's name for the field of the form. Raises `RequestError` and `PromptError`.
    """
    sampling = requests[0].sampling  # the same for all prompts of a body
    assert isinstance(sampling, SamplingOptions)
    seed = secrets.randbelow(2**32) if sampling.seed is None else sampling.seed
    samplings = [replace(sampling, seed=(seed + i) % 2**63) for i in range(n)]
    answers: list[Request] = []
    prompts: list[Prompt] = []
    for request in requests:
        try:
            prompt = model.prompt(request, at_end)
        except FormError as error:
            field = form_field if error.subject == "schema" else error.subject
            message = f"{field}: {error}{'. ' + error.hint if error.hint else ''}"
            raise RequestError(message, param=field, code=_CODES[error.subject]) from None
        except PromptTooLongError as error:
            error.hint = (error.hint or "").removeprefix(f"{LEAVE_OUT_HINT} ")  # which is a chat's
            raise
        answers += [replace(request, sampling=each) for each in samplings]
        prompts += [prompt] * n
    return APIRequest(tuple(answers), tuple(prompts), n, stream, include_usage, ignored)
