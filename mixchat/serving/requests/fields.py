"""Checked values from a JSON object: each field is taken once, and what is left is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from mixchat.chat.parameters import NumberParameter
from mixchat.serving.requests.errors import RequestError, plain

_SHOWN = 60  # characters of a value in a message


class Fields:
    """The fields of a JSON object; `path` is its place in the body, such as `messages[0]`.

    null counts as not given. Every method raises `RequestError` with the field's path for a value
    of another type, or outside its limits.
    """

    def __init__(self, values: Mapping[str, Any], path: str = "") -> None:
        self._values = dict(values)
        self._path = path

    def where(self, name: str) -> str:
        """Return the path of a field."""
        return f"{self._path}.{name}" if self._path else name

    def take(self, name: str) -> Any:
        """Return the value of a field as it is, None where it is not given."""
        return self._values.pop(name, None)

    def text(self, name: str) -> str | None:
        """Return a string, None where it is not given."""
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            self.wrong(name, "a string", value)
        return value

    def flag(self, name: str) -> bool:
        """Return true or false; false where it is not given."""
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            self.wrong(name, "true or false", value)
        return bool(value)

    def number(self, name: str, limits: NumberParameter) -> Any:
        """Return a number within its limits, None where it is not given.

        Where the limits are those of a whole number, another one is refused.
        """
        value = self.take(name)
        if value is None:
            return None
        return checked_number(value, limits, self.where(name))

    def items(self, name: str, most: int) -> list[Any] | None:
        """Return a list of at most so many items, None where it is not given."""
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, list):
            self.wrong(name, "a list", value)
        if len(value) > most:
            self.refuse(name, f"has {len(value)} items; at most {most} are taken")
        return value

    def fields(self, name: str) -> Fields | None:
        """Return the fields of an object, None where it is not given."""
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.wrong(name, "an object", value)
        return Fields(value, self.where(name))

    def named_items(self) -> Mapping[str, Any]:
        """Return all that is left, for an object whose names are data."""
        values, self._values = self._values, {}
        return values

    def refuse_if_given(self, reason: str, *names: str) -> None:
        """Raise `RequestError` for the first of these that is given; an empty list is nothing."""
        for name in names:
            if self.is_given(name):
                self.refuse(name, reason, code="unsupported_parameter")

    def ignore(self, *names: str) -> None:
        """Drop fields that change nothing."""
        for name in names:
            self.take(name)

    def is_given(self, name: str, usual: object = None) -> bool:
        """Drop a field; return whether it has another value than the usual one."""
        return self.take(name) not in (None, [], usual)

    def rename(self, name: str, ours: str, limits: NumberParameter) -> None:
        """Take a number as that of the field `ours`. Both may not be given and differ."""
        value = self.number(name, limits)
        if value is not None and self._values.setdefault(ours, value) != value:
            self.refuse(name, f"and {ours} differ: give one of them")

    def end(self) -> None:
        """Raise `RequestError` for the first field that nobody has taken, unless it is null."""
        for name, value in self._values.items():
            if value is not None:
                self.refuse(name, "is not a field that is known here", code="unknown_parameter")

    def refuse(self, name: str, reason: str, code: str | None = None) -> NoReturn:
        """Raise `RequestError` about a field."""
        refuse(self.where(name), reason, code)

    def wrong(self, name: str, wanted: str, value: object) -> NoReturn:
        """Raise `RequestError` about a value that is not as wanted."""
        refuse_value(self.where(name), wanted, value)


def checked_number(value: Any, limits: NumberParameter, path: str) -> Any:
    """Return `value` if it is a number within its limits. Raises `RequestError`."""
    kinds: Sequence[type] = (int,) if limits.kind is int else (int, float)
    try:
        # A double holds no whole number of 400 digits.
        if type(value) in kinds and limits.fits(value) and limits.kind(value) is not None:
            return value
    except OverflowError:
        pass
    refuse_value(path, limits.limits, value)


def fields_of(value: Any, path: str) -> Fields:
    """Return the fields of an item of a list. Raises `RequestError` where it is no object."""
    if not isinstance(value, dict):
        refuse_value(path, "an object", value)
    return Fields(value, path)


def refuse(path: str, reason: str, code: str | None = None) -> NoReturn:
    """Raise `RequestError` about the field at `path`."""
    raise RequestError(f"{plain(path)} {reason}", param=plain(path), code=code)


def refuse_value(path: str, wanted: str, value: object) -> NoReturn:
    """Raise `RequestError` about a value at `path` that is not as wanted."""
    refuse(path, f"has to be {wanted}, not {_shown(value)}", code="invalid_value")


def _shown(value: object) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, int) and abs(value) > 10**_SHOWN:
        return "a number of many digits"
    text = ascii(value[:_SHOWN]) if isinstance(value, str) else str(value)
    return text
