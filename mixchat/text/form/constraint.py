"""The tokens that keep an answer in its form, computed by llguidance in a sandbox.

V = vocab_size of the tokenizer.
"""

from __future__ import annotations

import weakref
from base64 import b64decode
from collections import deque
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mixchat.base.background import in_background
from mixchat.base.errors import UsageError
from mixchat.text.form.checked_form import LARGEST, PATIENT_S, PROGRAM, asked
from mixchat.text.form.form import Form
from mixchat.text.sandbox import Request, Sandbox

if TYPE_CHECKING:
    from mixchat.text.tokenizer import Tokenizer

_LOAD_S = 10.0  # computing time for a vocabulary; one of 256,000 tokens takes 1 s
_STEP_S = 0.5  # computing time for a token; ordinary ones take a hundredth of that at most
_SUBJECT = "the form of the answer"


class FormCompiler:
    """Compiles forms for one tokenizer, and the tokens that end its answers.

    A token that adds other bytes at the start of a text is there twice: a second time behind the
    vocabulary, as it is there. With the tokens `▁a`, `b` the bytes are " a", "b" and "a", and the
    token 0 is 2 where it comes first.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop_ids: Collection[int], seconds: float = PATIENT_S
    ) -> None:
        """Take the tokens' bytes; a form may take so many seconds of computing to compile.

        Raises `UsageError` where no token can end an answer.
        """
        tokens = tokenizer.token_bytes()
        stops = sorted(i for i in stop_ids if i < len(tokens.within))
        if not stops:
            raise UsageError("the model has no token that ends an answer of a given form")
        self.size, self.seconds = len(tokens.within), seconds
        self.firsts = {i: self.size + place for place, i in enumerate(tokens.first)}
        all_bytes = [text.decode("latin-1") for text in (*tokens.within, *tokens.first.values())]
        self._load = Request("the vocabulary", "load", (all_bytes, stops), _LOAD_S, LARGEST)
        self.idle = deque[Sandbox](maxlen=1)  # the sandbox of an answer that has ended

    def compile(self, form: Form) -> CompiledForm:
        """Return a form for this tokenizer."""
        return CompiledForm(form, self)

    def sandbox(self) -> Sandbox:
        """Return a sandbox that has all tokens, or soon will."""
        try:
            return self.idle.pop()
        except IndexError:
            return Sandbox(PROGRAM, [self._load])


class CompiledForm:
    """A form for one tokenizer; each answer starts a constraint of its own."""

    def __init__(self, form: Form, compiler: FormCompiler) -> None:
        self._form, self._compiler = form, compiler

    def start(self, before: Sequence[int] = (), *, continued: bool = False) -> FormConstraint:
        """Return a constraint for an answer that begins with the tokens `before`.

        continued: the answer continues the text of a prompt, so that its first word keeps its
        space. The form is compiled in the background.
        """
        return FormConstraint(self._form, self._compiler, before, begins_text=not continued)


class FormConstraint:
    """A `Constraint` of one answer: once it has its form, only a token that ends it is allowed.

    `compiled` has the mask of the first token. The sandbox ends with the constraint, unless the
    next answer can use it. Every method raises `UsageError` where the form is too complex, and
    `PromptError` where the tokens before do not have it.
    """

    def __init__(
        self, form: Form, compiler: FormCompiler, before: Sequence[int], *, begins_text: bool
    ) -> None:
        self._size, self._firsts = compiler.size, compiler.firsts
        self._begins_text, self._is_new = begins_text, True
        arguments = (form.grammar, [self._as_first(token) for token in before])
        request = Request(_SUBJECT, "start", arguments, compiler.seconds, LARGEST)
        self._sandbox = compiler.sandbox()
        self.compiled: Future[str] = in_background(asked, self._sandbox, request)
        weakref.finalize(self, _give_back, compiler, self._sandbox, self.compiled)

    def allowed(self) -> torch.Tensor:
        """Return the tokens that may come next: bool [V].

        Raises `UsageError` where the form allows none of the tokens, too.
        """
        bits = self.compiled.result() if self._is_new else self._ask("mask")
        mask = np.unpackbits(np.frombuffer(b64decode(bits), np.uint8), bitorder="little")
        mask = mask.view(np.bool_)
        if self._begins_text:
            mask[list(self._firsts)] = mask[list(self._firsts.values())]
        return torch.from_numpy(mask[: self._size])

    def accept(self, token: int) -> None:
        """Take the next token, which was allowed."""
        if not self.accepts(token):
            raise UsageError("the answer cannot be continued in its form")

    def accepts(self, token: int) -> bool:
        """Take the next token; return whether it was allowed. No other may come after one that
        was not."""
        self.compiled.result()
        self._is_new = False
        return bool(self._ask("accept", self._as_first(token)))

    def _as_first(self, token: int) -> int:
        """Return the id of a token as it is here, at the start of a text or behind that."""
        begins_text, self._begins_text = self._begins_text, False
        return self._firsts.get(token, token) if begins_text else token

    def _ask(self, method: str, *arguments: object) -> Any:
        return asked(self._sandbox, Request(_SUBJECT, method, arguments, _STEP_S))


def _give_back(compiler: FormCompiler, sandbox: Sandbox, first_mask: Future[str]) -> None:
    """Keep the sandbox for the next answer, unless it computes something that nobody wants."""
    if first_mask.done() and first_mask.exception() is None:
        compiler.idle.append(sandbox)
    else:
        sandbox.interrupt()
