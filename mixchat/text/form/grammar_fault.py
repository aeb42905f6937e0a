"""Finds the fault of a grammar, by llguidance, before there is a model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from mixchat.base.errors import UsageError, short_message

if TYPE_CHECKING:
    from llguidance import LLTokenizer

# Behind a grammar, so that its lines keep their numbers. Where only one text can follow, llguidance
# would force its own choice of tokens for it; the model knows better which ones it learned.
OPTIONS = '\n%llguidance {"no_forcing": true}\n'
_PLACE = re.compile(r"(?:at )?(\d+)\((\d+)\): (.*)", re.DOTALL)
_NO_TOKEN = "NoExtension"  # llguidance's reason where no token can come next
NO_TEXT = "no text has this form"


@dataclass(frozen=True)
class Fault:
    """A message with its line and column; both are 0 where the whole grammar is meant."""

    message: str
    line: int = 0
    column: int = 0


class _BareTokenizer:
    """A tokenizer as llguidance takes it: the tokens' bytes by id, and no way to encode text.

    Those of `special_token_ids` are no text; llguidance fails where one of them has no name.
    """

    bos_token_id = None

    def __init__(self, tokens: Sequence[bytes], stop_ids: Sequence[int]) -> None:
        self.tokens = [b"<stop>" if i in stop_ids else text for i, text in enumerate(tokens)]
        self.special_token_ids, self.eos_token_id = stop_ids, stop_ids[0]

    def __call__(self, text: bytes | str) -> list[int]:
        raise NotImplementedError("without forced tokens nothing is encoded")


def ll_tokenizer(tokens: Sequence[bytes], stop_ids: Sequence[int]) -> LLTokenizer:
    """Return llguidance's tokenizer for tokens by id, of which `stop_ids` end an answer."""
    from llguidance import LLTokenizer, TokenizerWrapper

    wrapped = TokenizerWrapper(_BareTokenizer(tokens, stop_ids))
    return LLTokenizer(wrapped, eos_token=list(stop_ids))


def find_fault(grammar: str) -> Fault | None:
    """Return what is wrong with a Lark grammar, None where it allows some first byte."""
    from llguidance import LLMatcher

    matcher = LLMatcher(_bytes_alone(), grammar + OPTIONS, log_level=0)
    matcher.compute_bitmask()
    return parsed_fault(matcher.get_error()) if matcher.is_error() else None


def parsed_fault(error: str) -> Fault:
    """Return an error of llguidance, which has a picture or a dump behind its first lines."""
    placed = _PLACE.match(error)
    message = placed[3] if placed else error
    if message.startswith(_NO_TOKEN):
        return Fault(NO_TEXT)
    message, _, details = message.partition("\n")
    message = message.partition("; following special tokens")[0]
    if details and message.endswith("regex parse error:"):
        message += details[details.rfind("\nerror: ") + 7 :].partition("\n")[0]
    place = (int(placed[1]), int(placed[2])) if placed else (0, 0)
    return Fault(short_message(message), *place)


def grammar_error(fault: Fault) -> UsageError:
    """Return the error for a grammar with this fault."""
    place = f" at line {fault.line}" if fault.line else ""
    place += f", column {fault.column}" if fault.column else ""
    return UsageError(f"the grammar cannot be used{place}: {fault.message}")


@cache
def _bytes_alone() -> LLTokenizer:
    """Return a tokenizer with a token for each byte, and one that ends an answer."""
    return ll_tokenizer([*(bytes([byte]) for byte in range(256)), b""], [256])
