"""The tokens that an output constraint allows next, computed by llguidance in a sandbox.

V = vocab_size of the tokenizer.
"""

from __future__ import annotations

import threading
import weakref
from base64 import b64decode
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from mixchat.base.errors import UsageError
from mixchat.base.progress import in_background
from mixchat.text.form.output_constraint import (
    MAX_CALL,
    PATIENT_S,
    PROGRAM,
    Acceptance,
    OutputConstraint,
    asked,
)
from mixchat.text.sandbox import Sandbox, SandboxCall

if TYPE_CHECKING:
    from mixchat.text.thinking import ThinkingParser
    from mixchat.text.tokenizer import Tokenizer

_LOAD_CPU_S = 10.0  # for a vocabulary; 256,000 tokens take 1 s
_STEP_CPU_S = 0.5  # for a token; an ordinary one takes a hundredth of it at most
_SUBJECT = "the form of the answer"
_MAX_OPENING = 32  # tokens
_IDLE_S = 60.0  # after which a sandbox that waits for another answer ends


class ConstraintCompiler:
    """Compiles output constraints for one tokenizer, and the tokens that end its answers.

    Some tokens add other bytes at the start of a text. Such a token has a second id, after the
    vocabulary, with these bytes. For the tokens `▁a`, `b` the bytes are " a", "b" and "a", and the
    token 0 becomes 2 at the start.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop_ids: Collection[int], seconds: float = PATIENT_S
    ) -> None:
        """Take the tokens' bytes. Compiling a constraint may take `seconds` of computing.

        Raises `UsageError` if no token can end an answer.
        """
        self._idle = deque[Sandbox](maxlen=1)  # the sandbox of an answer that has ended
        self._timer = threading.Timer(_IDLE_S, self._idle.clear)  # not started before `keep`
        tokens = tokenizer.token_bytes
        stops = sorted(i for i in stop_ids if i < len(tokens.within))
        if not stops:
            raise UsageError("the model has no token that ends an answer of a given form")
        self.size = len(tokens.within)
        self.seconds = seconds
        self.firsts = {i: self.size + number for number, i in enumerate(tokens.first)}
        all_bytes = [text.decode("latin-1") for text in (*tokens.within, *tokens.first.values())]
        self._load = SandboxCall(
            "the vocabulary", "load", (all_bytes, stops, self.size), _LOAD_CPU_S, MAX_CALL
        )

    def __del__(self) -> None:
        self._timer.cancel()

    def compile(self, constraint: OutputConstraint) -> StartConstraint:
        """Return a function that starts the constraint of an answer of this form."""
        return partial(TokenConstraint, constraint.grammar, self)

    def sandbox(self) -> Sandbox:
        """Return a sandbox that has all tokens, or is getting them."""
        self._timer.cancel()
        try:
            return self._idle.pop()
        except IndexError:
            return Sandbox(PROGRAM, [self._load])

    def keep(self, sandbox: Sandbox) -> None:
        """Keep a sandbox for the next answer, for a minute. An older kept one ends."""
        self._timer.cancel()
        self._idle.append(sandbox)
        self._timer = threading.Timer(_IDLE_S, self._idle.clear)
        self._timer.daemon = True
        try:
            self._timer.start()
        except RuntimeError:  # the limit of threads is reached
            self._idle.clear()


class TokenConstraint:
    """A `Constraint` of one answer. Once the form is complete, only a token that ends it may come.

    The answer begins with the tokens `beginning`. If it is `continued`, it continues the text of a
    prompt, and its first word keeps its space. If it is JSON, it ends within `room` tokens, the one
    that ends it among them. The grammar is compiled in the background.

    `compiled` has the mask of the first token. `close` ends the sandbox, unless the next answer can
    use it. The other methods raise `UsageError` if the grammar is too complex, and `PromptError` if
    the tokens before do not fit it.
    """

    def __init__(
        self,
        grammar: str,
        compiler: ConstraintCompiler,
        beginning: Sequence[int] = (),
        *,
        continued: bool = False,
        room: int | None = None,
    ) -> None:
        self._size = compiler.size
        self._firsts = compiler.firsts
        self._begins_text = not continued
        self._is_new = True
        arguments = (grammar, [self._as_first(token) for token in beginning], room)
        call = SandboxCall(_SUBJECT, "start", arguments, compiler.seconds, MAX_CALL)
        self._sandbox = compiler.sandbox()
        self.compiled: Future[str] = in_background(asked, self._sandbox, call)
        self.close = weakref.finalize(self, _give_back, compiler, self._sandbox, self.compiled)

    def allowed(self) -> torch.Tensor:
        """Return the tokens that may come next, bool [V].

        Also raises `UsageError` if the form allows no token.
        """
        bits = self.compiled.result() if self._is_new else self._ask("mask")
        mask = np.unpackbits(np.frombuffer(b64decode(bits), np.uint8), bitorder="little")
        mask = mask.view(np.bool_)
        if self._begins_text:
            mask[list(self._firsts)] = mask[list(self._firsts.values())]
        return torch.from_numpy(mask[: self._size])

    def accept(self, token: int) -> bool:
        """Take the next token, which was allowed. Return False if it would leave too few."""
        begins_text = self._begins_text
        acceptance = self.accepts(token)
        if acceptance == "wrong":
            raise UsageError("the answer cannot be continued in its form")
        if acceptance == "late":
            self._begins_text = begins_text
        return acceptance == "taken"

    def accepts(self, token: int) -> Acceptance:
        """Take the next token, if it is allowed. After a wrong one no token may follow."""
        self.compiled.result()
        self._is_new = False
        acceptance: Acceptance = self._ask("accept", self._as_first(token))
        return acceptance

    def _as_first(self, token: int) -> int:
        """Return the id by which the sandbox knows a token, at the start of a text or later."""
        begins_text = self._begins_text
        self._begins_text = False
        return self._firsts.get(token, token) if begins_text else token

    def _ask(self, method: str, *arguments: object) -> Any:
        return asked(self._sandbox, SandboxCall(_SUBJECT, method, arguments, _STEP_CPU_S))


# Starts a constraint. Takes the tokens of an answer's beginning, and `continued`.
StartConstraint: TypeAlias = Callable[..., TokenConstraint]


def _give_back(compiler: ConstraintCompiler, sandbox: Sandbox, first_mask: Future[str]) -> None:
    """Keep the sandbox for the next answer, unless it is still computing for this one."""
    if first_mask.done() and first_mask.exception() is None:
        compiler.keep(sandbox)
    else:
        sandbox.interrupt()


class CallConstraint:
    """A `Constraint` that allows every token until the parser finds the opening of a call.

    The parser has to take each token before `allowed` is called. The rest of the token with the
    opening may not fit the constraint. Then the text is no call, and every token stays allowed.
    """

    def __init__(
        self, form: TokenConstraint, parser: ThinkingParser, opening: str, tokenizer: Tokenizer
    ) -> None:
        self._form = form
        self._parser = parser
        self._opening = opening
        self._tokenizer = tokenizer
        self._opening_id = tokenizer.control_tokens.get(opening)
        self._last = deque[int](maxlen=_MAX_OPENING)
        self._has_begun = False
        self.compiled: Future[None] = Future()  # the answer may begin before the form is compiled
        self.compiled.set_result(None)

    def allowed(self) -> torch.Tensor | None:
        if not self._has_begun and self._parser.opens_call:
            self._has_begun = True
            # The last tokens, from the one in which the opening begins.
            tokens = list(self._last)
            for start in range(len(tokens) - 1, -1, -1):
                text = self._tokenizer.decode(tokens[start:])
                if tokens[start] == self._opening_id or self._opening in text:
                    tokens = tokens[start:]
                    break
            self._parser.may_call = all(self._form.accepts(each) == "taken" for each in tokens)
        return self._form.allowed() if self._counts else None

    def accept(self, token: int) -> bool:
        if self._counts:
            return self._form.accept(token)
        self._last.append(token)
        return True

    def close(self) -> None:
        self._form.close()

    @property
    def _counts(self) -> bool:
        return self._has_begun and self._parser.may_call
