"""The interface of a tokenizer, and the rules for control tokens that both kinds follow."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, TypeAlias

from mixchat.base.errors import PromptError
from mixchat.text.detokenizer import Detokenizer, TokenBytes

# The replacement of a character in a template's text: plain text, or ids that stay as they are.
Insert: TypeAlias = "str | tuple[int, ...]"

# Matches Gemma's quote, and <...>, <|...|> or [...] with one word in it. The word has a letter or
# digit, so that prose and code do not match. Only one part of the pattern can take the first
# letter. Otherwise a long text without a closing bracket would take hours.
_MARKUP = re.compile(r"<[^\s<>\w]*\w[^\s<>]*>|\[[^\s\[\]\w]*\w[^\s\[\]]*\]|<\|\"\|>")


class Tokenizer(Protocol):
    """Turns text into token ids and back. Untrusted text never yields a control token.

    A control token (`</s>`, `<|im_end|>`) steers the model. Templates may write control tokens.
    People may not, so `encode` yields none, whatever the text.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    adds_bos: bool  # whether the checkpoint wants BOS in front of plain text
    control_tokens: Mapping[str, int]
    token_bytes: TokenBytes

    def encode(self, text: str) -> list[int]:
        """Return the ids of untrusted text, without control tokens and BOS.

        Raises `PromptError` if `text` is not valid Unicode.
        """

    def encode_template(self, text: str, inserts: Mapping[str, Insert] | None = None) -> list[int]:
        """Return the ids of trusted text. Control tokens count, and no BOS is added.

        `inserts` maps single characters of `text` to their replacements. A string is inserted as
        untrusted text, ids are inserted as they are. Raises `PromptError` as `encode` does.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids without special and unknown ones. Broken UTF-8 is U+FFFD."""
        detokenizer = Detokenizer(self.token_bytes)
        return "".join(map(detokenizer.add, ids)) + detokenizer.flush()


class TokenTexts:
    """The bytes of each token, or a control token's name."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bytes = tokenizer.token_bytes.within
        self._names = {token: name.encode() for name, token in tokenizer.control_tokens.items()}

    def bytes_of(self, token: int) -> bytes:
        known = self._bytes[token] if token < len(self._bytes) else b""
        return known or self._names.get(token, b"")

    def __getitem__(self, token: int) -> str:
        """Return a token's text, with U+FFFD for a part of a character."""
        return self.bytes_of(token).decode(errors="replace")


def require_unicode(text: str) -> None:
    """Raise `PromptError` if `text` holds half a surrogate pair, which no tokenizer accepts."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(
            f"the text is not valid Unicode: a lone surrogate at character {error.start}"
        ) from None


def looks_like_markup(token: str) -> bool:
    """Return whether a token looks like control markup, as `<tool>`, `<|im_end|>`, `[INST]` do."""
    return _MARKUP.fullmatch(token.strip().strip("\u2581")) is not None


def token_pattern(tokens: Iterable[str], *, whole_words: Iterable[str] = ()) -> re.Pattern[str]:
    """Return a pattern for any of `tokens`, the longest first. Without tokens it matches nothing.

    A token in `whole_words` counts only if no word character touches it.
    """
    bounded = frozenset(whole_words)
    choices = [
        rf"(?<!\w){re.escape(token)}(?!\w)" if token in bounded else re.escape(token)
        for token in sorted(tokens, key=len, reverse=True)
    ]
    return re.compile("|".join(choices) or r"(?!)")
