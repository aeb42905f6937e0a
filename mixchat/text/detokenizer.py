"""Turns streams of token ids into text, never half a character, and finds stop strings in it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mixchat.text.tokenizer import Tokenizer

# A character has at most four bytes, and each may be a token. So only the last three can still
# change.
_MAX_PENDING = 3  # tokens
_KEPT_TOKENS = 12  # when the window is cut, so that enough text comes before the last three
_MAX_WINDOW = 2 * _KEPT_TOKENS  # tokens


class Detokenizer:
    """Turns ids into text, one at a time. Each costs the decoding of a short window.

    The texts of `add` and `flush`, joined, are what `decode(prompt + ids)` adds to
    `decode(prompt)`. If "\u20ac" is three byte tokens:
        add(▁a) = "a", add(<0xE2>) = "", add(<0x82>) = "", add(<0xAC>) = "\u20ac"
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        """Continue the text of `prompt_ids`, which must end with a whole character."""
        self._tokenizer = tokenizer
        self._window: list[int] = []
        for token_id in reversed(prompt_ids):
            if not self._is_silent(token_id):
                self._window.insert(0, token_id)
            if len(self._window) == _KEPT_TOKENS:
                break
        self._text = tokenizer.decode(self._window)
        self._shown = len(self._text)
        self._pending = ""

    def add(self, token_id: int) -> str:
        """Return the text that has become certain, which is often one word, sometimes nothing."""
        text = self._tokenizer.decode([*self._window, token_id])
        if text == self._text and self._is_silent(token_id):
            return ""
        self._text = text
        self._window.append(token_id)
        certain = len(text) - _pending_length(text)
        new, self._pending = text[self._shown : certain], text[max(certain, self._shown) :]
        self._shown = max(self._shown, certain)
        if len(self._window) >= _MAX_WINDOW:
            # The window may begin inside a character, but its text begins the same every time.
            self._window = self._window[-_KEPT_TOKENS:]
            self._text = self._tokenizer.decode(self._window)
            self._shown = len(self._text) - len(self._pending)
        return new

    def flush(self) -> str:
        """Return the rest at the end of the ids. An unfinished character is U+FFFD."""
        rest, self._pending = self._pending, ""
        self._shown += len(rest)
        return rest

    def _is_silent(self, token_id: int) -> bool:
        """Return whether a token has no text. A control token would push text out of the window."""
        # A single token of one space decodes to "", too, because a leading space is dropped.
        return self._tokenizer.decode([token_id, token_id]) == ""


def _pending_length(text: str) -> int:
    """Return how many characters at the end may be the start of an incomplete character."""
    whole = len(text.rstrip("\ufffd"))
    return min(len(text) - whole, _MAX_PENDING)


class StopStrings:
    """Looks for stop strings in a stream of text, and holds back what may be the start of one.

    The string that ends first counts, and of several that end together the longest. So the result
    does not depend on how the text is cut. With the stop string "END":
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
            self._held, self._stopped = "", True
            return text[: min(ends)[1]], True
        safe = len(text) - self._partial(text)
        self._held = text[safe:]
        return text[:safe], False

    def flush(self) -> str:
        """Return the text that was held back, at the end of a text without a stop string."""
        rest, self._held = self._held, ""
        return rest

    def _partial(self, text: str) -> int:
        """Return the length of the longest end of `text` that begins a stop string."""
        longest = max((len(s) - 1 for s in self._strings), default=0)
        sizes = range(min(longest, len(text)), 0, -1)
        begins = (size for size in sizes if any(s.startswith(text[-size:]) for s in self._strings))
        return next(begins, 0)
