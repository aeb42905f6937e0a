"""Values as literals, in Python's form or in Gemma's, which has a token around each text.

The quote of a text, `"` or Gemma's `<|"|>`, tells which form it is. Gemma's form has no escapes, no
blanks, and no quotes around the keys of an object.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import Any, NoReturn

PYTHON = '"'
GEMMA = '<|"|>'
_CONSTANTS = {
    word: value
    for value, words in (("true", "true True"), ("false", "false False"), ("null", "null None"))
    for word in words.split()
}
# A quote ends a Python text only where a text can end, because some models write 'it's' without
# escapes.
_AFTER_TEXT = re.compile(r"\s*(?:[,)\]}:]|$)")
_TOKENS = {
    PYTHON: re.compile(
        rf"""(?P<text>(["'])(?:\\.|(?!\2)[^\\]|\2(?!{_AFTER_TEXT.pattern}))*\2)"""
        r"|(?P<word>[A-Za-z]\w*)|(?P<bracket>[()])",
        re.DOTALL,
    ),
    GEMMA: re.compile(
        rf"(?P<text>{re.escape(GEMMA)}.*?{re.escape(GEMMA)})"
        r"|(?P<key>[^\s:,{}\[\]<]+)(?=\s*:)|(?P<word>[A-Za-z]\w*)",
        re.DOTALL,
    ),
}
# The stops of a search for the end of a literal, outside of texts and within one.
_STOPS = {
    PYTHON: re.compile(r"""["'()\[\]{},]"""),
    GEMMA: re.compile(rf"{re.escape(GEMMA)}|[\[\]{{}},]"),
}
_TEXT_STOPS = {
    "'": re.compile(r"\\.|'", re.DOTALL),
    PYTHON: re.compile(r'\\.|"', re.DOTALL),
    GEMMA: re.compile(re.escape(GEMMA)),
}


def literal_of(value: Any, quote: str) -> str:
    """Return a JSON value as a literal."""
    is_python = quote == PYTHON
    comma = ", " if is_python else ","
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False) if is_python else f"{quote}{value}{quote}"
    if isinstance(value, dict):
        # The names are sorted as in Gemma's template.
        items = value.items() if is_python else sorted(value.items(), key=lambda x: x[0].lower())
        pairs = (
            f"{literal_of(key, quote)}: {literal_of(item, quote)}"
            if is_python
            else f"{key}:{literal_of(item, quote)}"
            for key, item in items
        )
        return f"{{{comma.join(pairs)}}}"
    if isinstance(value, list):
        return f"[{comma.join(literal_of(item, quote) for item in value)}]"
    if is_python and (value is None or isinstance(value, bool)):
        return str(value)
    return json.dumps(value)


def json_of(literal: str, quote: str) -> str:
    """Return a literal as JSON. Other text becomes a string."""

    def converted(match: re.Match[str]) -> str:
        token = match[0]
        if match["text"]:
            size = len(quote)
            return json.dumps(_unescaped(token) if quote == PYTHON else token[size:-size])
        if match["word"]:
            return _CONSTANTS.get(token, token)
        return json.dumps(token) if quote == GEMMA else "[" if token == "(" else "]"

    return checked_json(_TOKENS[quote].sub(converted, literal)) or json.dumps(literal)


def checked_json(text: str) -> str | None:
    """Return JSON in its usual form, None if the text is no JSON."""
    with suppress(ValueError, RecursionError):
        value = json.loads(text, parse_constant=refuse_constant)
        with suppress(ValueError):
            return json.dumps(value, allow_nan=False)
        return text  # it has a number above the largest float
    return None


def refuse_constant(constant: str) -> NoReturn:
    """Raise `ValueError` for a constant that JSON lacks, such as NaN."""
    raise ValueError(f"{constant} is not a number in JSON")


def _unescaped(text: str) -> str:
    """Return the value of a Python text in quotes. Unknown escapes stay as they are."""
    inner = text[1:-1]

    def in_json(match: re.Match[str]) -> str:
        return {'"': '\\"', "\\'": "'"}.get(match[0], match[0])

    with suppress(ValueError):
        value: str = json.loads(f'"{re.sub(_TEXT_STOPS[PYTHON], in_json, inner)}"', strict=False)
        return value
    return inner


class LiteralEnd:
    """Finds the end of a literal in a text that grows, at the comma or bracket after it."""

    def __init__(self, quote: str) -> None:
        self._form, self._quote = quote, ""  # the form and the quote of the text that is open
        self._at = self._depth = 0

    def find(self, text: str) -> int | None:
        """Return the length of the literal that begins the text, None if more text is needed."""
        while True:
            stops = _TEXT_STOPS[self._quote] if self._quote else _STOPS[self._form]
            match = stops.search(text, self._at)
            if match is None:
                # The last characters may be half of an escape or of a quote.
                self._at = max(self._at, len(text) - len(self._form))
                return None
            stop = match[0]
            after = match.end()
            if self._quote:
                if self._form == PYTHON and stop == self._quote:
                    if not text[after:].strip():
                        return None
                    stop = stop if _AFTER_TEXT.match(text, after) else ""
                self._quote = "" if stop == self._quote else self._quote
            elif stop in "([{":
                self._depth += 1
            elif stop in ")]},":
                if self._depth == 0:
                    return match.start()
                self._depth -= stop != ","
            else:
                self._quote = stop
            self._at = after
