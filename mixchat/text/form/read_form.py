"""Reads forms: schemas as JSON or from files, grammars from files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mixchat.base.errors import UsageError
from mixchat.text.form.checked_form import checked_grammar, checked_schema
from mixchat.text.form.form import Form
from mixchat.text.form.gbnf import looks_like_gbnf

_MOST = 4_000_000  # bytes


def read_schema(value: str) -> Form:
    """Return the form of a JSON schema, or of the file that holds it.

    Raises `UsageError` with the line and column of what is not JSON, or the pointer of what cannot
    be met or used.
    """
    inline = value.lstrip().startswith("{")
    with _named("--schema" if inline else value):
        return checked_schema(_parsed(value if inline else _read(Path(value))))


def read_grammar(path: Path) -> Form:
    """Return the form of a grammar: GBNF or Lark by the file's ending, else by its content.

    Raises `UsageError` with the line of what cannot be read, and for what takes too much.
    """
    with _named(str(path)):
        text, ending = _read(path), path.suffix.lower()
        is_gbnf = ending == ".gbnf" or (ending != ".lark" and looks_like_gbnf(text))
        return checked_grammar(text, is_gbnf)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Put the name of what is read in front of an error's message."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{name}: {error}", hint=error.hint) from None


def _read(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            data = file.read(_MOST + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"cannot be read ({reason})") from None
    if len(data) > _MOST:
        raise UsageError(f"more than {_MOST // 10**6} MB")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"not UTF-8 at offset {error.start}") from None


def _parsed(text: str) -> object:
    def refuse(constant: str) -> object:
        raise ValueError(f"{constant} is not a number in JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise UsageError(f"not JSON at {place}: {error.msg}") from None
    except RecursionError:
        raise UsageError("too deeply nested") from None
    except ValueError as error:
        raise UsageError(f"not JSON: {error}") from None
