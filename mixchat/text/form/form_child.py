"""The inside of the sandbox in which llguidance runs, to check constraints and answers.

A constraint of 1 kB can take gigabytes and minutes, when it is compiled or at any token of its
answer, and llguidance's own limits do not bound that.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from mixchat.base.errors import PromptError, UsageError
from mixchat.text.form.call_form import call_grammar
from mixchat.text.form.ending import Ending, Place
from mixchat.text.form.grammar import (
    NO_TEXT,
    OPTIONS,
    checked_lark,
    grammar_error,
    lark_from_gbnf,
    ll_tokenizer,
    parsed_fault,
)
from mixchat.text.form.output_constraint import Acceptance, Kind
from mixchat.text.form.schema import JSON_START, schema_grammar
from mixchat.text.sandbox_child import serve

_MAX_DIGITS = 20  # in a row, of a number's integer, fraction or exponent

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_GRAMMAR_OF: dict[Kind, Callable[[str], str]] = {
    "schema": schema_grammar,
    "calls": call_grammar,
    "lark": checked_lark,
    "gbnf": lark_from_gbnf,
}


def main(argument: str) -> None:
    """Serve the parent."""
    import llguidance  # noqa: F401 - before the limits are set

    serve(_FormService())


class _FormService:
    """The methods that a call can name."""

    _vocabulary: LLTokenizer
    _matcher: LLMatcher
    _digits: _DigitLimit
    _ending: Ending | None

    def check(self, language: Kind, text: str) -> str:
        """Return the Lark grammar of a constraint. Raises `UsageError`."""
        return _GRAMMAR_OF[language](text)

    def load(self, tokens: Sequence[str], stop_ids: Sequence[int], size: int) -> None:
        """Take the bytes of all tokens. The first `size` belong to the vocabulary."""
        self._tokens = [token.encode("latin-1") for token in tokens]
        self._stop_ids = stop_ids
        self._size = size
        self._vocabulary = ll_tokenizer(self._tokens, stop_ids)
        self._digits = _DigitLimit(self._tokens)

    def start(self, grammar: str, beginning: Sequence[int], room: int | None) -> str:
        """Start an answer that begins with the tokens `beginning`, and return the first mask.

        room: tokens that are left for it, None for any number. Only JSON ends within them.
        """
        from llguidance import LLMatcher

        self._matcher = LLMatcher(self._vocabulary, grammar + OPTIONS, log_level=0)
        if self._matcher.is_error():
            raise grammar_error(parsed_fault(self._matcher.get_error()))
        if not all(map(self._matcher.consume_token, beginning)):
            raise PromptError("the answer so far does not have the form that is asked for")
        is_json = grammar.startswith(JSON_START)
        self._digits.start(beginning, is_json=is_json)
        self._ending = None
        if is_json and room is not None:
            ending = Ending(grammar, self._tokens, self._size, room)
            self._ending = ending if ending.start(beginning) else None
        return self.mask()

    def mask(self) -> str:
        """Return the bits of the tokens that may come next."""
        bits = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            fault = parsed_fault(self._matcher.get_error()).message
            no_token = "the model has no token for what has to come"
            reason = no_token if fault == NO_TEXT else fault
            raise UsageError(f"the answer cannot be continued in its form: {reason}")
        forced = None if self._ending is None else self._ending.forced
        if forced is None:
            return b64encode(self._digits.limited(bits)).decode()
        return b64encode(_only(forced or self._stop_ids, len(bits))).decode()

    def accept(self, token: int) -> Acceptance:
        """Take the next token, if it is allowed and leaves enough tokens."""
        if not self._matcher.consume_token(token):
            return "wrong"
        ending = None if token in self._stop_ids else self._ending
        if ending is not None and not ending.take(token):
            self._matcher.rollback(1)
            return "late"
        self._digits.take(token)
        return "taken"


def _only(tokens: Iterable[int], size: int) -> bytes:
    """Return the mask of these tokens, of so many bytes."""
    mask = 0
    for token in tokens:
        mask |= 1 << token
    return mask.to_bytes(size, "little")


class _DigitLimit:
    """Ends numbers in JSON, whose digits llguidance does not bound. A weak model repeats them."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self._tokens = tokens
        begins_with_digit = bytearray(-(-len(tokens) // 32) * 4)
        for number, token in enumerate(tokens):
            begins_with_digit[number // 8] |= token[:1].isdigit() << number % 8
        self._digits = int.from_bytes(begins_with_digit, "little")

    def start(self, beginning: Sequence[int], *, is_json: bool) -> None:
        """Begin an answer with the tokens `beginning`. Only JSON has a limit."""
        self._is_json = is_json
        self._place = Place()
        self._run = 0
        for token in beginning:
            self.take(token)

    def take(self, token: int) -> None:
        """Count the digits at the end of an answer, outside of its texts."""
        for byte in self._tokens[token] if self._is_json else b"":
            self._place = self._place.after(byte)
            is_digit = ord("0") <= byte <= ord("9") and not self._place.in_text
            self._run = self._run + 1 if is_digit else 0

    def limited(self, bits: bytes) -> bytes:
        """Return the mask, without digits after too many of them if anything else may come."""
        mask = int.from_bytes(bits, "little")
        if self._run < _MAX_DIGITS or not mask & ~self._digits:
            return bits
        return (mask & ~self._digits).to_bytes(len(bits), "little")
