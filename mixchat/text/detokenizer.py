"""Turns streams of token ids into text, of whole characters, and finds stop strings in it."""

from __future__ import annotations

from codecs import getincrementaldecoder
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class TokenBytes:
    """The bytes that each token adds to the UTF-8 of a text, none for control tokens."""

    within: Sequence[bytes]  # of a token after other tokens, by id
    # Only the tokens that add other bytes at the start of a text, because SentencePiece drops a
    # leading space there.
    first: Mapping[int, bytes]
    # The bytes of control tokens that a person sees, such as `<think>`. They are not marked as
    # special.
    names: Mapping[int, bytes] = field(default_factory=dict)

    def added(self, token: int, *, is_first: bool) -> bytes:
        """Return the bytes that a token adds to a text that a person sees. Unknown ids add none."""
        if is_first and token in self.first:
            return self.first[token]
        known = self.within[token] if 0 <= token < len(self.within) else b""
        return known or self.names.get(token, b"")


class Detokenizer:
    """Turns ids into text, one at a time.

    The texts of `add` and `flush`, joined, are what `decode(prompt + ids)` adds to
    `decode(prompt)`. If "\u20ac" is three byte tokens:
        add(▁a) = "a", add(<0xE2>) = "", add(<0x82>) = "", add(<0xAC>) = "\u20ac"
    """

    def __init__(self, tokens: TokenBytes, prompt_ids: Sequence[int] = ()) -> None:
        """Continue the text of `prompt_ids`, which must end with a whole character."""
        self._tokens = tokens
        self._decoder = getincrementaldecoder("utf-8")("replace")
        self._is_first = True
        for token in prompt_ids:
            if not self._is_first:
                break
            self._bytes_of(token)

    def add(self, token_id: int) -> str:
        """Return the text that is certain now, often one word, sometimes nothing."""
        return self._decoder.decode(self._bytes_of(token_id))

    def flush(self) -> str:
        """Return the rest at the end of the ids. An unfinished character is U+FFFD."""
        return self._decoder.decode(b"", final=True)

    def _bytes_of(self, token_id: int) -> bytes:
        added = self._tokens.added(token_id, is_first=self._is_first)
        # If a token is only a space, which the start drops, it still counts as the first token.
        if added or token_id in self._tokens.first:
            self._is_first = False
        return added


class StopStrings:
    """Looks for stop strings in a stream of text, and holds back what may be the start of one.

    The string that ends first counts. If several end together, the longest one counts. So the
    result does not depend on the pieces in which the text comes. With the stop string "END":
    add("the E") = ("the ", False), add("N") = ("", False), add("Dx") = ("", True)
    """

    def __init__(self, strings: Iterable[str]) -> None:
        """Look for `strings`, without the empty ones."""
        self._strings = sorted({s for s in strings if s}, key=len, reverse=True)
        self._held = ""
        self._stopped = False

    def add(self, text: str) -> tuple[str, bool]:
        """Return the text that is safe to show, and whether a stop string has come.

        After a stop string the text is always empty.
        """
        if self._stopped:
            return "", True
        text = self._held + text
        ends = [(i + len(s), i) for s in self._strings if (i := text.find(s)) >= 0]
        if ends:
            self._held = ""
            self._stopped = True
            return text[: min(ends)[1]], True
        longest = max((len(s) - 1 for s in self._strings), default=0)
        sizes = range(min(longest, len(text)), 0, -1)
        begun = (size for size in sizes if any(s.startswith(text[-size:]) for s in self._strings))
        safe = len(text) - next(begun, 0)
        self._held = text[safe:]
        return text[:safe], False

    def flush(self) -> str:
        """Return the text that was held back, at the end of a text without a stop string."""
        held = self._held
        self._held = ""
        return held
