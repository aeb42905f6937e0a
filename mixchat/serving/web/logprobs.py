"""Log probabilities in the shapes of OpenAI: that of chat, and the older one of completion."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mixchat.serving.service import TokenLogprob
from mixchat.text.tokenizer import Tokenizer

_LEAST = -9999.0  # stands for minus infinity, which JSON cannot express
_UNKNOWN = "\ufffd"


class TokenTexts:
    """The text of each token by itself, a control token's by its name."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known = {token: name for name, token in tokenizer.control_tokens.items()}
        self._before: tuple[list[int], str] | None = None

    def learn(self, tokens: Iterable[TokenLogprob]) -> None:
        """Decode those that are not known yet, which may block: the tokenizer is a process."""
        for token in tokens:
            for number in (token.token, *(other for other, _ in token.top)):
                if number not in self._known:
                    self._known[number] = self._decode(number)

    def __getitem__(self, token: int) -> str:
        """Return the text of a token that `learn` had."""
        return self._known[token]

    def _decode(self, token: int) -> str:
        # Behind another one, because a tokenizer may drop the space in front of the first.
        if self._before is None:
            ids = self._tokenizer.encode("a")
            self._before = ids, self._tokenizer.decode(ids)
        ids, text = self._before
        return self._tokenizer.decode([*ids, token])[len(text) :]


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
    top = [_one(texts[other], logprob) for other, logprob in token.top]
    return {**_one(texts[token.token], token.logprob), "top_logprobs": top}


def _one(text: str, logprob: float) -> dict[str, Any]:
    # The bytes of a part of a character are not known here.
    known = None if _UNKNOWN in text else list(text.encode())
    return {"token": text, "logprob": _finite(logprob), "bytes": known}


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)
