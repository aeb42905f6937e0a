"""The constraint of an answer that may call tools, from its first call on.

V = vocab_size of the tokenizer.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from typing import TYPE_CHECKING

from mixchat.text.form.constraint import TokenConstraint

if TYPE_CHECKING:
    import torch

    from mixchat.text.thinking import ThinkingParser
    from mixchat.text.tokenizer import Tokenizer

_MAX_OPENING = 32  # tokens


class CallConstraint:
    """A `Constraint` that allows every token until the parser finds the opening of a call.

    The parser has to take each token before `allowed` is called. What follows an opening in the
    same token may not fit the constraint. Then nothing is a call, and every token stays allowed.
    """

    def __init__(
        self, form: TokenConstraint, parser: ThinkingParser, opening: str, tokenizer: Tokenizer
    ) -> None:
        self._form, self._parser, self._opening = form, parser, opening
        self._tokenizer = tokenizer
        self._opening_id = tokenizer.control_tokens.get(opening)
        self._last = deque[int](maxlen=_MAX_OPENING)
        self._has_begun = False
        self.compiled: Future[None] = Future()  # the answer may begin before the form is compiled
        self.compiled.set_result(None)

    def allowed(self) -> torch.Tensor | None:
        if not self._has_begun and self._parser.opens_call:
            self._has_begun = True
            self._parser.may_call = all(map(self._form.accepts, self._opening_tokens()))
        return self._form.allowed() if self._counts else None

    def accept(self, token: int) -> None:
        if self._counts:
            self._form.accept(token)
        else:
            self._last.append(token)

    @property
    def _counts(self) -> bool:
        return self._has_begun and self._parser.may_call

    def _opening_tokens(self) -> list[int]:
        """Return the last tokens, from the one in which the opening begins."""
        last = list(self._last)
        for start in range(len(last) - 1, -1, -1):
            tokens = last[start:]
            if tokens[0] == self._opening_id or self._opening in self._tokenizer.decode(tokens):
                return tokens
        return last
