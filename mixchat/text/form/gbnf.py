"""Grammars of llama.cpp (GBNF) as Lark grammars, which llguidance converts."""

from __future__ import annotations

import re

from mixchat.text.form.grammar_fault import Fault, grammar_error

_RULE = re.compile(r"^[ \t]*([\w-]+)[ \t]*::=", re.MULTILINE)
_LARK_RULE = re.compile(r"^\w+:", re.MULTILINE)
_MISSING = re.compile(r"Rule '(.*)' not found")
# Escapes of characters: llguidance only converts those in ASCII.
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|.)", re.DOTALL)


def looks_like_gbnf(text: str) -> bool:
    """Return whether a grammar has a rule as GBNF writes one: `name ::= ...`."""
    return _RULE.search(text) is not None


def lark_from_gbnf(text: str) -> str:
    """Return a grammar as Lark. Raises `UsageError` with the line where it cannot be read."""
    from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark

    rules = _RULE.findall(text)
    for number, name in enumerate(rules):
        if name in rules[:number]:
            raise grammar_error(Fault(f"the rule {name} is there twice", _lines(text)[number]))
    try:
        return gbnf_to_lark(_ESCAPE.sub(_unescaped, text))
    except GbnfToLarkError as error:
        line = text.count("\n", 0, error.pos.pos) + 1
        raise grammar_error(Fault(str(error).partition(" at line ")[0], line)) from None
    except Exception as error:  # the package has no other class for what it does not like
        missing = _MISSING.fullmatch(str(error))
        used = missing and re.search(rf"(?<![\w-]){re.escape(missing[1])}(?![\w-])", text)
        line = text.count("\n", 0, used.start()) + 1 if used else 0
        raise grammar_error(Fault(str(error), line)) from None


def line_in_gbnf(text: str, lark: str, line: int) -> int:
    """Return the line of the rule that became the one at a line of the Lark grammar."""
    before = "\n".join(lark.split("\n")[:line])
    number = len(_LARK_RULE.findall(before))
    return _lines(text)[number - 1] if number else 0


def _lines(text: str) -> list[int]:
    """Return the line of each rule."""
    return [text.count("\n", 0, match.start(1)) + 1 for match in _RULE.finditer(text)]


def _unescaped(match: re.Match[str]) -> str:
    digits = match[1] or match[2]
    code = int(digits, 16) if digits else 0
    return chr(code) if 0x80 <= code < 0x110000 and not 0xD800 <= code < 0xE000 else match[0]
