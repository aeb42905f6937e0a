"""The fields of a request as pydantic models, and OpenAI's errors."""

from __future__ import annotations

from collections.abc import Container
from itertools import islice
from typing import Any, ClassVar, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PlainValidator,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from mixchat.chat.parameters import NumberParameter
from mixchat.serving.requests.errors import RequestError, field_error, path_text, shown, value_error

_MAX_FIELDS = 100  # more than any object has known ones
# OpenAI's code and our words, by pydantic's type of an error.
_CODES = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}
_REASONS = {
    "missing": "is missing",
    "extra_forbidden": "is not a field that is known here",
    "model_type": "has to be an object",
    "dict_type": "has to be an object",
}
_Model = TypeVar("_Model", bound="RequestObject")


class RequestObject(BaseModel):
    """A JSON object of exact types, in which true is not 1. Unknown fields are refused.

    null counts as not given. The `ignored` fields may have any value.
    """

    model_config = ConfigDict(strict=True, extra="forbid")
    ignored: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _drop_ignored(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        kept = (
            (n, value) for n, value in given.items() if value is not None and n not in cls.ignored
        )
        return dict(islice(kept, _MAX_FIELDS))  # pydantic makes an error for each unknown field


def validated(model: type[_Model], given: object) -> _Model:
    """Return JSON as a model. Raises `RequestError` about the first wrong field."""
    try:
        return model.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    raise _request_error(first)


def known_fields(
    kind: type[RequestObject], body: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Return the fields of a body that `kind` has, and the names of the others."""
    names = {*kind.ignored, *kind.model_fields}
    given = {name: value for name, value in body.items() if value is not None}
    known = {name: value for name, value in given.items() if name in names}
    return known, [name for name in given if name not in names]


def _request_error(details: ErrorDetails) -> RequestError:
    path, kind = path_text(details["loc"]), details["type"]
    code = details.get("ctx", {}).get("code", _CODES.get(kind, "invalid_value"))
    reason = _REASONS.get(kind) or details["msg"].replace("Input should be", "has to be", 1)
    if code == "invalid_value" and reason.startswith("has to be"):
        reason += f", not {shown(details['input'])}"
    return field_error(path, reason, code)


def wrong(code: str | None, reason: str) -> PydanticCustomError:
    """Return a validator's error, with a code of OpenAI's."""
    return PydanticCustomError("wrong", reason, {"code": code})


def only(allowed: Container[object], code: str, reason: str) -> AfterValidator:
    """Return a validator that refuses other values."""

    def check(value: Any) -> Any:
        if value not in allowed:
            raise wrong(code, reason)
        return value

    return AfterValidator(check)


def max_items(limit: int) -> BeforeValidator:
    """Return a validator that refuses long lists before it checks their items."""

    def check(value: Any) -> Any:
        if isinstance(value, list) and len(value) > limit:
            raise wrong(None, f"has {len(value)} items; at most {limit} are taken")
        return value

    return BeforeValidator(check)


def number(limits: NumberParameter) -> PlainValidator:
    """Return a validator that takes a number within its limits."""

    def check(value: Any) -> Any:
        if not _fits(value, limits):
            raise wrong("invalid_value", f"has to be {limits.limits}")
        return value

    return PlainValidator(check)


def checked_number(value: Any, limits: NumberParameter, path: str) -> Any:
    """Return a number within its limits. Raises `RequestError`."""
    if not _fits(value, limits):
        raise value_error(path, limits.limits, value)
    return value


def _fits(value: Any, limits: NumberParameter) -> bool:
    kinds = (int,) if limits.kind is int else (int, float)
    try:
        return type(value) in kinds and limits.fits(value) and limits.kind(value) is not None
    except OverflowError:  # a double holds no whole number of 400 digits
        return False
