"""The tokens that keep an answer in its form, computed by llguidance.

V = vocab_size of the tokenizer.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from mixchat.errors import PromptError, UsageError
from mixchat.text.form.form import Form
from mixchat.text.form.grammar_fault import (
    NO_TEXT,
    OPTIONS,
    grammar_error,
    ll_tokenizer,
    parsed_fault,
    require_llguidance,
)
from mixchat.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


class FormCompiler:
    """Compiles forms for one tokenizer, and the tokens that end its answers.

    A token that adds other bytes at the start of a text is there twice: a second time behind the
    vocabulary, as it is there. With the tokens `▁a`, `b` the bytes are " a", "b" and "a", and the
    token 0 is 2 where it comes first.
    """

    def __init__(self, tokenizer: Tokenizer, stop_ids: Collection[int]) -> None:
        """Take the tokens' bytes. Raises `UsageError` where no token can end an answer."""
        tokens = tokenizer.token_bytes()
        stops = sorted(i for i in stop_ids if i < len(tokens.within))
        if not stops:
            raise UsageError("the model has no token that ends an answer of a given form")
        size = len(tokens.within)
        firsts = {i: size + place for place, i in enumerate(tokens.first)}
        whole = ll_tokenizer([*tokens.within, *tokens.first.values()], stops)
        self._vocabulary = _Vocabulary(size, firsts, whole)

    def compile(self, form: Form) -> CompiledForm:
        """Return a form for this tokenizer. Raises `UsageError` where it is too large."""
        matcher = require_llguidance().LLMatcher(
            self._vocabulary.tokenizer, form.grammar + OPTIONS, log_level=0
        )
        if matcher.is_error():
            raise grammar_error(parsed_fault(matcher.get_error()))
        return CompiledForm(matcher, self._vocabulary)


@dataclass(frozen=True)
class _Vocabulary:
    """The tokens of a model: how many, their second ids at the start of a text, their bytes."""

    size: int
    firsts: dict[int, int]
    tokenizer: LLTokenizer


class CompiledForm:
    """A form for one tokenizer; each answer starts a constraint of its own."""

    def __init__(self, matcher: LLMatcher, vocabulary: _Vocabulary) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary

    def start(self, before: Sequence[int] = (), *, continued: bool = False) -> FormConstraint:
        """Return a constraint for an answer that begins with the tokens `before`.

        continued: the answer continues the text of a prompt, so that its first word keeps its
        space. Raises `PromptError` where `before` does not have the form.
        """
        matcher = self._matcher.deep_copy()
        constraint = FormConstraint(matcher, self._vocabulary, begins_text=not continued)
        for token in before:
            if not constraint.accepts(token):
                raise PromptError("the answer so far does not have the form that is asked for")
        return constraint


class FormConstraint:
    """A `Constraint` of one answer: once it has its form, only a token that ends it is allowed."""

    def __init__(self, matcher: LLMatcher, vocabulary: _Vocabulary, *, begins_text: bool) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary
        self._begins_text = begins_text

    def allowed(self) -> torch.Tensor:
        """Return the tokens that may come next: bool [V].

        Raises `UsageError` where the form allows none of the tokens, or is too complex.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise self._error()
        mask = np.unpackbits(bits, bitorder="little").view(np.bool_)
        size, firsts = self._vocabulary.size, self._vocabulary.firsts
        if self._begins_text:
            mask[list(firsts)] = mask[list(firsts.values())]
        return torch.from_numpy(mask[:size])

    def accept(self, token: int) -> None:
        """Take the next token, which was allowed. Raises `UsageError` as `allowed` does."""
        if not self.accepts(token):
            raise self._error()

    def accepts(self, token: int) -> bool:
        """Take the next token; return whether it was allowed. No other may come after one that
        was not."""
        if self._begins_text:
            token = self._vocabulary.firsts.get(token, token)
            self._begins_text = False
        return self._matcher.consume_token(token)

    def _error(self) -> UsageError:
        fault = parsed_fault(self._matcher.get_error()).message
        reason = "the model has no token for what has to come" if fault == NO_TEXT else fault
        return UsageError(f"the answer cannot be continued in its form: {reason}")
