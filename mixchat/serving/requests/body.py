"""JSON from the bytes of a body, which every reader understands alike."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from mixchat.serving.requests.errors import RequestError, plain

_MAX_LEVELS = 64  # of nested lists and objects
_MAX_QUOTE = 80  # characters


def read_object(body: bytes, name: str = "the body") -> dict[str, Any]:
    """Return the JSON object in `body`, which messages call `name`.

    Raises `RequestError` for other JSON, numbers beyond a double, a field given twice, half a
    surrogate pair, and more than 64 levels.
    """
    try:
        value = json.loads(
            body.decode("utf-8"),
            parse_constant=_refuse_constant,
            parse_float=_finite,
            object_pairs_hook=_distinct,
        )
        _check(value, "", 0)
    except UnicodeDecodeError as error:
        raise RequestError(f"{name} is not UTF-8: byte {error.start}") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise RequestError(f"{name} is not JSON: {error.msg:.{_MAX_QUOTE}} at {place}") from None
    except RecursionError:
        raise _too_deep("") from None
    except ValueError:  # Python's limit for digits
        raise RequestError(f"{name} has a number of too many digits") from None
    if not isinstance(value, dict):
        raise RequestError(f"{name} has to be a JSON object")
    return value


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


def _check(value: Any, path: str, depth: int) -> None:
    if depth > _MAX_LEVELS:
        raise _too_deep(path)
    if isinstance(value, str):
        _check_text(value, path)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check(item, f"{path}[{index}]", depth + 1)
    elif isinstance(value, dict):
        for name, item in value.items():
            _check_text(name, path)
            _check(item, f"{path}.{name}" if path else name, depth + 1)


def _check_text(text: str, path: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        param = plain(path) or "a name"
        raise RequestError(f"{param} has half of a surrogate pair", param=param) from None


def _too_deep(path: str) -> RequestError:
    return RequestError(f"it has more than {_MAX_LEVELS} levels", param=plain(path) or None)
