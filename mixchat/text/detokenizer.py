"""Turns a stream of token ids into a stream of text, without ever showing half a character."""

from __future__ import annotations

from collections.abc import Sequence

from mixchat.text.tokenizer import Tokenizer

# A character has at most four bytes, each of which may be a token: what can still change is in the
# last three. Twelve tokens hold that, and text before it, with room to spare.
_MAX_PENDING = 3
_KEEP = 12
_WINDOW = 2 * _KEEP


class Detokenizer:
    """Text from ids, one at a time; each costs the decoding of a short window.

    All that `add` and `flush` return, joined, is `tokenizer.decode(ids)`; after a prompt it is what
    `decode(prompt + ids)` has more than `decode(prompt)`, so that a first word keeps its space.

    An example, where "\u20ac" is three byte tokens:
        add(▁a) = "a", add(<0xE2>) = "", add(<0x82>) = "", add(<0xAC>) = "\u20ac"
    """

    def __init__(self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = ()) -> None:
        """`prompt_ids` are what the text goes on from; they must end with a whole character."""
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
        """The text that is certain now and was not before; often one word, maybe nothing."""
        text = self._tokenizer.decode([*self._window, token_id])
        if text == self._text and self._is_silent(token_id):
            return ""
        self._text = text
        self._window.append(token_id)
        certain = len(text) - _pending_length(text)
        new, self._pending = text[self._shown : certain], text[max(certain, self._shown) :]
        self._shown = max(self._shown, certain)
        if len(self._window) >= _WINDOW:
            # What is left begins anywhere, even inside a character, but the same way every time.
            self._window = self._window[-_KEEP:]
            self._text = self._tokenizer.decode(self._window)
            self._shown = len(self._text) - len(self._pending)
        return new

    def flush(self) -> str:
        """The rest, at the end: an unfinished character is U+FFFD."""
        rest, self._pending = self._pending, ""
        self._shown += len(rest)
        return rest

    def _is_silent(self, token_id: int) -> bool:
        """Whether a token has no text: a control token. It would push text out of the window."""
        # Alone, a token of one space is silent as well: a leading space is not shown.
        return self._tokenizer.decode([token_id, token_id]) == ""


def _pending_length(text: str) -> int:
    """How many characters at the end may be the start of a character that is not complete."""
    whole = len(text.rstrip("\ufffd"))
    return min(len(text) - whole, _MAX_PENDING)
