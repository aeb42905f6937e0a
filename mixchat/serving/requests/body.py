"""JSON from the bytes of a body, which every reader understands alike."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from mixchat.serving.requests.errors import RequestError, path_text, plain

_MAX_LEVELS = 64  # of nested lists and objects
_MAX_QUOTE = 80  # characters
_CHECKED = (str, list, dict)  # kinds of values


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
        _check(value, [])
    except UnicodeDecodeError as error:
        raise RequestError(f"{name} is not UTF-8: byte {error.start}") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise RequestError(f"{name} is not JSON: {error.msg:.{_MAX_QUOTE}} at {place}") from None
    except RecursionError:
        raise RequestError(f"it has more than {_MAX_LEVELS} levels") from None
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


def _check(value: Any, path: list[str | int]) -> None:
    """Check the value at `path`.

    The path is written out only for an error. A name of 500 kB over 240,000 items would otherwise
    be copied for each of them.
    """
    if isinstance(value, str):
        _check_text(value, path)
    elif isinstance(value, list | dict):
        if len(path) > _MAX_LEVELS:
            raise RequestError(f"it has more than {_MAX_LEVELS} levels", param=_shown(path) or None)
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
        param = _shown(path) or "a name"
        raise RequestError(f"{param} has half of a surrogate pair", param=param) from None


def _shown(path: Sequence[str | int]) -> str:
    return plain(path_text(path))
