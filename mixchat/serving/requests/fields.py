"""The JSON of a body, and its fields as pydantic models, with OpenAI's errors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Container, Sequence
from itertools import islice
from typing import Any, ClassVar, TypeAlias, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PlainValidator,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from mixchat.base.option import Option
from mixchat.serving.requests.errors import (
    RequestError,
    field_error,
    path_text,
    plain,
    shown,
    value_error,
)

_MAX_LEVELS = 64  # of nested lists and objects
_MAX_QUOTE = 80  # characters
_CHECKED = (str, list, dict)  # kinds of values
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

JSON: TypeAlias = dict[str, Any]


def read_object(body: bytes, name: str = "the body") -> JSON:
    """Return the JSON object in `body`, which messages call `name`.

    Raises `RequestError` for what other readers would understand otherwise: numbers beyond a
    double, a field given twice, half a surrogate pair, and more than 64 levels.
    """
    try:
        value = json.loads(
            body.decode("utf-8"),
            parse_constant=_refuse_constant,
            parse_float=_finite,
            object_pairs_hook=_distinct,
        )
        _check(value, [])
    except UnicodeDecodeError as error:
        raise RequestError(f"{name} is not UTF-8: byte {error.start}") from None
    except json.JSONDecodeError as error:
        position = f"line {error.lineno}, column {error.colno}"
        raise RequestError(f"{name} is not JSON: {error.msg:.{_MAX_QUOTE}} at {position}") from None
    except RecursionError:
        raise RequestError(f"it has more than {_MAX_LEVELS} levels") from None
    except ValueError:  # Python's limit for digits
        raise RequestError(f"{name} has a number of too many digits") from None
    if not isinstance(value, dict):
        raise RequestError(f"{name} has to be a JSON object")
    return value


def to_json(value: object) -> bytes:
    """Return JSON in ASCII on one line. Raises `ValueError` for NaN, which JSON lacks."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def _refuse_constant(name: str) -> float:
    raise RequestError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise RequestError(f"the number {text[:_MAX_QUOTE]} is too large")
    return value


def _distinct(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise RequestError(f"the field {name[:_MAX_QUOTE]!a} is given twice", param=plain(name))
        values[name] = value
    return values


def _check(value: Any, path: list[str | int]) -> None:
    """Check the value at `path`.

    The path is written out only for an error. A name of 500 kB over 240,000 items would otherwise
    be copied for each of them.
    """
    if isinstance(value, str):
        _check_text(value, path)
    elif isinstance(value, list | dict):
        if len(path) > _MAX_LEVELS:
            param = plain(path_text(path)) or None
            raise RequestError(f"it has more than {_MAX_LEVELS} levels", param=param)
        for key, item in enumerate(value) if isinstance(value, list) else value.items():
            if isinstance(key, str):
                _check_text(key, path)
            if isinstance(item, _CHECKED):
                path.append(key)
                _check(item, path)
                path.pop()


def _check_text(text: str, path: Sequence[str | int]) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        param = plain(path_text(path)) or "a name"
        raise RequestError(f"{param} has half of a surrogate pair", param=param) from None


class RequestObject(BaseModel):
    """A JSON object of exact types, in which true is not 1. Unknown fields are refused.

    null counts as not given. The `ignored` fields may have any value.
    """

    model_config = ConfigDict(strict=True, extra="forbid")
    ignored: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _drop_ignored(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        kept = (
            (name, value)
            for name, value in fields.items()
            if value is not None and name not in cls.ignored
        )
        return dict(islice(kept, _MAX_FIELDS))  # pydantic makes an error for each unknown field


def validated(model: type[_Model], value: object, path: str = "") -> _Model:
    """Return JSON as a model. Raises `RequestError` about the first wrong field.

    path: of the value in its body.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        details = error.errors(include_url=False)[0]
    inner = path_text(details["loc"])
    error_type = details["type"]
    code = details.get("ctx", {}).get("code", _CODES.get(error_type, "invalid_value"))
    reason = _REASONS.get(error_type) or details["msg"].replace("Input should be", "has to be", 1)
    if code == "invalid_value" and reason.startswith("has to be"):
        reason += f", not {shown(details['input'])}"
    raise field_error(f"{path}.{inner}" if path and inner else path or inner, reason, code)


def read_known(model: type[_Model], body: JSON, path: str = "") -> tuple[_Model, list[str]]:
    """Return the fields that `model` has, and the names of the others. Raises as `validated`."""
    names = {*model.ignored, *model.model_fields}
    prefix = f"{path}." if path else ""
    unused = [f"{prefix}{name}" for name in body if name not in names and body[name] is not None]
    known = {name: value for name, value in body.items() if name in names}
    return validated(model, known, path), unused


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


def or_text(wrap: Callable[[str], object]) -> BeforeValidator:
    """Return a validator that takes a text in place of a list with the wrapped text."""
    return BeforeValidator(lambda value: [wrap(value)] if isinstance(value, str) else value)


def as_part(text: str) -> JSON:
    """Return a text as a part or a block of a message."""
    return {"type": "text", "text": text}


def max_items(limit: int) -> BeforeValidator:
    """Return a validator that refuses long lists before it checks their items."""

    def check(value: Any) -> Any:
        if isinstance(value, list) and len(value) > limit:
            raise wrong("invalid_value", f"has {len(value)} items; at most {limit} are taken")
        return value

    return BeforeValidator(check)


def within(option: Option) -> PlainValidator:
    """Return a validator that takes a value of an option."""

    def check(value: Any) -> Any:
        usable = option.accepted(value)
        if usable is None:
            raise wrong("invalid_value", f"has to be {option.rule}")
        return usable

    return PlainValidator(check)


def checked(value: Any, option: Option, path: str) -> Any:
    """Return a value of an option. Raises `RequestError` about the field at `path`."""
    usable = option.accepted(value)
    if usable is None:
        raise value_error(path, option.rule, value)
    return usable
