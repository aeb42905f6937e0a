"""Log probabilities in the shapes of OpenAI: that of chat, and the older one of completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mixchat.serving.service import TokenLogprob
from mixchat.text.tokenizer import Tokenizer

_LEAST = -9999.0  # stands for minus infinity, which JSON cannot express


class TokenTexts:
    """The bytes of each token; a control token, which adds none to a text, has its name."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._names = {token: name.encode() for name, token in tokenizer.control_tokens.items()}
        self._bytes: Sequence[bytes] | None = None

    def load(self) -> None:
        """Ask the tokenizer, which may take a second, and no time when it was asked before."""
        if self._bytes is None:
            self._bytes = self._tokenizer.token_bytes().within

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes of a token, once they are loaded."""
        assert self._bytes is not None
        known = self._bytes[token] if token < len(self._bytes) else b""
        return known or self._names.get(token, b"")

    def __getitem__(self, token: int) -> str:
        """Return the text of a token by itself; a part of a character is U+FFFD."""
        return self.bytes_of(token).decode(errors="replace")


def chat_logprobs(tokens: Sequence[TokenLogprob], texts: TokenTexts) -> dict[str, Any]:
    """Return what a choice of a chat has as `logprobs`."""
    return {"content": [_of_chat(token, texts) for token in tokens], "refusal": None}


def completion_logprobs(
    tokens: Sequence[TokenLogprob], texts: TokenTexts, offset: int
) -> dict[str, Any]:
    """Return what a choice of a completion has as `logprobs`.

    offset: where the first token begins in the text, in characters.
    """
    own = [texts[token.token] for token in tokens]
    offsets = [offset + sum(map(len, own[:i])) for i in range(len(own))]
    return {
        "tokens": own,
        "token_logprobs": [_finite(token.logprob) for token in tokens],
        "top_logprobs": [{texts[t]: _finite(p) for t, p in token.top} for token in tokens],
        "text_offset": offsets,
    }


def _of_chat(token: TokenLogprob, texts: TokenTexts) -> dict[str, Any]:
    top = [_one(other, logprob, texts) for other, logprob in token.top]
    return {**_one(token.token, token.logprob, texts), "top_logprobs": top}


def _one(token: int, logprob: float, texts: TokenTexts) -> dict[str, Any]:
    return {
        "token": texts[token],
        "logprob": _finite(logprob),
        "bytes": list(texts.bytes_of(token)),
    }


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)
