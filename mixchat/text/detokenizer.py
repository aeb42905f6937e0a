"""Turns a stream of token ids into a stream of text that never ends in half a character."""

from __future__ import annotations

from collections.abc import Sequence

from mixchat.text.tokenizer import Tokenizer

# A character has at most four bytes, each of which may be a token: only the last three tokens can
# still change. Twelve hold those and enough text before them.
_MAX_PENDING = 3
_KEEP = 12
_WINDOW = 2 * _KEEP


class Detokenizer:
    """Turns ids into text, one at a time; each costs the decoding of a short window.

    The texts of `add` and `flush`, joined, are `tokenizer.decode(ids)`; after a prompt they are
    what `decode(prompt + ids)` adds to `decode(prompt)`, so that a first word keeps its space.

    An example, where "\u20ac" is three byte tokens:
        add(▁a) = "a", add(<0xE2>) = "", add(<0x82>) = "", add(<0xAC>) = "\u20ac"
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        """Continue the text of `prompt_ids`, which must end with a whole character."""
        self._tokenizer = tokenizer
        self._window: list[int] = []
        for token_id in reversed(prompt_ids):
            if not self._is_silent(token_id):
                self._window.insert(0, token_id)
            if len(self._window) == _KEEP:
                break
        self._text = tokenizer.decode(self._window)
        self._shown = len(self._text)
        self._pending = ""

    def add(self, token_id: int) -> str:
        """Return the text that has become certain: often one word, sometimes nothing."""
        text = self._tokenizer.decode([*self._window, token_id])
        if text == self._text and self._is_silent(token_id):
            return ""
        self._text = text
        self._window.append(token_id)
        certain = len(text) - _pending_length(text)
        new, self._pending = text[self._shown : certain], text[max(certain, self._shown) :]
        self._shown = max(self._shown, certain)
        if len(self._window) >= _WINDOW:
            # The window may begin inside a character, but its text begins the same every time.
            self._window = self._window[-_KEEP:]
            self._text = self._tokenizer.decode(self._window)
            self._shown = len(self._text) - len(self._pending)
        return new

    def flush(self) -> str:
        """Return the rest at the end of the ids; an unfinished character is U+FFFD."""
        rest, self._pending = self._pending, ""
        self._shown += len(rest)
        return rest

    def _is_silent(self, token_id: int) -> bool:
        """Return whether a token has no text. A control token would push text out of the window."""
        # A single token of one space decodes to "", too: a leading space is dropped.
        return self._tokenizer.decode([token_id, token_id]) == ""


def _pending_length(text: str) -> int:
    """Return how many characters at the end may be the start of an incomplete character."""
    whole = len(text.rstrip("\ufffd"))
    return min(len(text) - whole, _MAX_PENDING)
