"""Finds the faults of grammars, by llguidance, and converts llama.cpp's (GBNF) to Lark."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from mixchat.base.errors import UsageError, short_message

if TYPE_CHECKING:
    from llguidance import LLTokenizer

# These lines come after a grammar, so that its own lines keep their numbers. They stop llguidance
# from forcing tokens if only one text can follow. The model knows better in which tokens it learned
# that text.
OPTIONS = '\n%llguidance {"no_forcing": true}\n'
_PLACE = re.compile(r"(?:at )?(\d+)\((\d+)\): (.*)", re.DOTALL)
_NO_TOKEN = "NoExtension"  # llguidance's reason if no token can come next
NO_TEXT = "no text has this form"

_RULE = re.compile(r"^[ \t]*([\w-]+)[ \t]*::=", re.MULTILINE)
_LARK_RULE = re.compile(r"^\w+:", re.MULTILINE)
_MISSING = re.compile(r"Rule '(.*)' not found")
# Escapes of characters. llguidance converts only those of ASCII.
_ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|.)", re.DOTALL)


@dataclass(frozen=True)
class Fault:
    """A message with its line and column. Both are 0 if the whole grammar is meant."""

    message: str
    line: int = 0
    column: int = 0


class _BareTokenizer:
    """A tokenizer for llguidance. It has the tokens' bytes by id, and cannot encode text.

    The tokens of `special_token_ids` have no text. llguidance fails if one of them has no name.
    """

    bos_token_id = None

    def __init__(self, tokens: Sequence[bytes], stop_ids: Sequence[int]) -> None:
        self.tokens = [b"<stop>" if i in stop_ids else text for i, text in enumerate(tokens)]
        self.special_token_ids = stop_ids
        self.eos_token_id = stop_ids[0]

    def __call__(self, text: bytes | str) -> list[int]:
        raise NotImplementedError("without forced tokens nothing is encoded")


def ll_tokenizer(tokens: Sequence[bytes], stop_ids: Sequence[int]) -> LLTokenizer:
    """Return llguidance's tokenizer for tokens by id, of which `stop_ids` end an answer."""
    from llguidance import LLTokenizer, TokenizerWrapper

    wrapped = TokenizerWrapper(_BareTokenizer(tokens, stop_ids))
    return LLTokenizer(wrapped, eos_token=list(stop_ids))


def find_fault(grammar: str) -> Fault | None:
    """Return what is wrong with a Lark grammar, None if it allows some first byte."""
    from llguidance import LLMatcher

    matcher = LLMatcher(bytes_alone(), grammar + OPTIONS, log_level=0)
    matcher.compute_bitmask()
    return parsed_fault(matcher.get_error()) if matcher.is_error() else None


def checked_lark(text: str) -> str:
    """Return a Lark grammar. Raises `UsageError` with the line and column of its fault."""
    if (fault := find_fault(text)) is not None:
        raise grammar_error(fault)
    return text


def parsed_fault(error: str) -> Fault:
    """Return the fault in an error of llguidance, without the excerpt or dump after it."""
    placed = _PLACE.match(error)
    message = placed[3] if placed else error
    if message.startswith(_NO_TOKEN):
        return Fault(NO_TEXT)
    message, _, details = message.partition("\n")
    message = message.partition("; following special tokens")[0]
    if details and message.endswith("regex parse error:"):
        message += details[details.rfind("\nerror: ") + 7 :].partition("\n")[0]
    position = (int(placed[1]), int(placed[2])) if placed else (0, 0)
    return Fault(short_message(message), *position)


def grammar_error(fault: Fault) -> UsageError:
    """Return the error for a grammar with this fault."""
    position = f" at line {fault.line}" if fault.line else ""
    position += f", column {fault.column}" if fault.column else ""
    return UsageError(f"the grammar cannot be used{position}: {fault.message}")


@cache
def bytes_alone() -> LLTokenizer:
    """Return a tokenizer with a token for each byte, and one that ends an answer."""
    return ll_tokenizer([*(bytes([byte]) for byte in range(256)), b""], [256])


def looks_like_gbnf(text: str) -> bool:
    """Return whether a grammar has a rule of GBNF, as in `name ::= ...`."""
    return _RULE.search(text) is not None


def lark_from_gbnf(text: str) -> str:
    """Return a grammar of llama.cpp as Lark. Raises `UsageError` with the line of its fault."""
    lark = _converted(text)
    if (fault := find_fault(lark)) is not None:
        # The converter keeps the order of the rules.
        head = "\n".join(lark.split("\n")[: fault.line])
        number = len(_LARK_RULE.findall(head))
        raise grammar_error(Fault(fault.message, _lines(text)[number - 1] if number else 0))
    return lark


def _converted(text: str) -> str:
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
    except Exception as error:  # the converter raises no class of its own
        missing = _MISSING.fullmatch(str(error))
        used = missing and re.search(rf"(?<![\w-]){re.escape(missing[1])}(?![\w-])", text)
        line = text.count("\n", 0, used.start()) + 1 if used else 0
        raise grammar_error(Fault(str(error), line)) from None


def _lines(text: str) -> list[int]:
    return [text.count("\n", 0, match.start(1)) + 1 for match in _RULE.finditer(text)]


def _unescaped(match: re.Match[str]) -> str:
    digits = match[1] or match[2]
    code = int(digits, 16) if digits else 0
    return chr(code) if 0x80 <= code < 0x110000 and not 0xD800 <= code < 0xE000 else match[0]
