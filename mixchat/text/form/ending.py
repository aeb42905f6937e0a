"""Finds how an answer in JSON can end within the tokens that are left.

A matcher of single bytes follows the answer. From its state a short end is looked for, such as
`"}]}` within a text. The answer has to follow that end once another token would leave too few.
"""

from __future__ import annotations

import string
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple

from mixchat.text.form.grammar import OPTIONS, bytes_alone

if TYPE_CHECKING:
    from llguidance import LLMatcher

_PAUSE = 16  # tokens after an end was not found, before another one is looked for
_MAX_BYTES = 8192  # of an end
_MAX_RUN = 300  # bytes of the rest of a text, before other ways are tried
_MAX_S = 0.2  # of trying other ways
_MAX_TOKEN = 64  # bytes of a token of an end
_WAYS = 16  # that are tried at once
_FEW = 30  # bytes, all of which are tried
# The bytes that end a text, or another part. Then what short values begin with, and all others.
_IN_TEXT = b'"'
_OUTSIDE = b"}],:"
_OTHERS = b'0"1tfn[{-' + b"a2A." + bytes(range(0x20, 0x7F)) + b"\n\t" + bytes(range(0x80, 0x100))


class Place(NamedTuple):
    """A place in JSON, within a text or outside."""

    in_text: bool = False
    is_escaped: bool = False  # by a backslash

    def after(self, byte: int) -> Place:
        is_quote = byte == ord('"') and not self.is_escaped
        return Place(self.in_text ^ is_quote, byte == ord("\\") and not self.is_escaped)


class Ending:
    """Follows an answer, of which at most `room` tokens are left with the one that ends it.

    tokens: the bytes of each token by id. An end has the first `size` tokens. If no end fits at the
    beginning, every token may follow.
    """

    def __init__(self, grammar: str, tokens: Sequence[bytes], size: int, room: int) -> None:
        from llguidance import LLMatcher

        self._matcher = LLMatcher(bytes_alone(), grammar + OPTIONS, log_level=0)
        self._tokens = tokens
        self._size = size
        self._left = room
        self._place = Place()
        self._pause = 0  # tokens for which no end is looked for
        self._end: list[int] | None = None  # of the answer so far, if it was looked for and fits
        self._forced: list[int] | None = None  # an end that has to follow

    def start(self, beginning: Iterable[int]) -> bool:
        """Begin an answer with the tokens `beginning`, which are not counted.

        Return whether it can end within the room.
        """
        for token in beginning:
            self._follow(token)
        self._end = self._fitting_end()
        return self._end is not None

    @property
    def forced(self) -> Sequence[int] | None:
        """Return the next token of an end that has to follow, none after its last one.

        None if other tokens may follow, too.
        """
        return None if self._forced is None else self._forced[:1]

    def take(self, token: int) -> bool:
        """Take the next token, which the form allows. Return False if it leaves too few.

        Then it is not taken, and an end has to follow.
        """
        if self._forced is not None:
            del self._forced[:1]
            return True
        last_end = self._end
        self._follow(token)
        self._left -= 1
        if self._pause:
            self._pause -= 1
            self._end = None
        else:
            self._end = self._fitting_end()
        if self._end is None and last_end is not None and not self._pause:
            self._forced = last_end
        return self._forced is None

    def _follow(self, token: int) -> None:
        for byte in self._tokens[token]:
            self._matcher.consume_token(byte)
            self._place = self._place.after(byte)

    def _fitting_end(self) -> list[int] | None:
        """Return the tokens of an end that fits into those left, None if none was found."""
        text = short_end(self._matcher, self._place)
        tokens = None if text is None else self._encoded(text)
        if tokens is None:
            self._pause = _PAUSE
            return None
        return tokens if len(tokens) < self._left else None

    def _encoded(self, text: bytes) -> list[int] | None:
        """Return tokens of a text, the longest first, None if a byte has no token."""
        tokens = []
        start = 0
        while start < len(text):
            ends = range(min(start + _MAX_TOKEN, len(text)), start, -1)
            end = next((end for end in ends if text[start:end] in self._ids), None)
            if end is None:
                return None
            tokens.append(self._ids[text[start:end]])
            start = end
        return tokens

    @cached_property
    def _ids(self) -> dict[bytes, int]:
        # Of equal tokens the first.
        return {text: i for i, text in reversed([*enumerate(self._tokens[: self._size])])}


def short_end(matcher: LLMatcher, place: Place) -> bytes | None:
    """Return bytes that complete a text in JSON, few if possible, None if none are found.

    matcher: of `bytes_alone`, after the text.
    """
    matcher = matcher.deep_copy()
    end = bytearray()
    while not matcher.is_accepting():
        first = next(_possible(matcher, place), None)
        if first is None or len(end) > _MAX_BYTES:
            return None
        rest: bytes | None = bytes([first])
        if place.in_text and first not in _IN_TEXT:
            rest = _rest_of_text(matcher, place)
        if rest is None:
            return None
        for byte in rest:
            matcher.consume_token(byte)
            place = place.after(byte)
        end += rest
    return bytes(end)


def _rest_of_text(matcher: LLMatcher, place: Place) -> bytes | None:
    """Return bytes after which a text within JSON may end. Only patterns and lengths need some."""
    straight = bytearray()
    copy = matcher.deep_copy()
    at = place
    while len(straight) < _MAX_RUN and (byte := next(_possible(copy, at), None)) is not None:
        if byte in _IN_TEXT and not at.is_escaped:
            return bytes(straight)
        copy.consume_token(byte)
        at = at.after(byte)
        straight.append(byte)
    return _shortest_rest(matcher, place)


def _shortest_rest(matcher: LLMatcher, place: Place) -> bytes | None:
    """Return the rest of a text by trying some ways at once, of which the first ones to go on."""
    latest = time.process_time() + _MAX_S
    ways = [(b"", matcher.deep_copy(), place)]
    while ways and time.process_time() < latest:
        families = []
        for rest, state, at in ways:
            children: dict[bytes, tuple[bytes, LLMatcher, Place]] = {}
            for byte in _unlike(_possible(state, at)):
                if byte in _IN_TEXT and not at.is_escaped:
                    return rest
                child = state.deep_copy()
                child.consume_token(byte)
                # Of those after which the same bytes may follow, one is enough.
                children.setdefault(
                    child.compute_bitmask(), (rest + bytes([byte]), child, at.after(byte))
                )
            families.append([*children.values()])
        # The first of each, then the second of each, or the first way alone would go on.
        turns = zip_longest(*families)
        ways = [way for turn in turns for way in turn if way is not None][:_WAYS]
    return None


def _unlike(possible: Iterable[int]) -> list[int]:
    """Return these bytes, of many only one digit, one small and one capital letter, and signs."""
    every = [byte for byte in possible if byte < 0x80]
    if len(every) <= _FEW:
        return every
    kinds = dict.fromkeys(string.digits, "0")
    kinds |= dict.fromkeys(string.ascii_lowercase, "a") | dict.fromkeys(string.ascii_uppercase, "A")
    firsts: dict[str, int] = {}
    for byte in every:
        firsts.setdefault(kinds.get(chr(byte), chr(byte)), byte)
    return [*firsts.values()]


def _possible(matcher: LLMatcher, place: Place) -> Iterator[int]:
    """Yield the bytes that may come next, those first that are sooner at an end."""
    mask = int.from_bytes(matcher.compute_bitmask(), "little")
    ends = _IN_TEXT if place.in_text else _OUTSIDE
    yield from (byte for byte in (*ends, *_OTHERS) if mask >> byte & 1)
