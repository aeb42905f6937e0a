"""Random texts of a form, and whether a text has one, by a tokenizer with a token for each byte.

Forms are checked in this process here, and not in a sandbox.
"""

import json
import random
from collections.abc import Mapping
from functools import cache

from mixchat.text.detokenizer import TokenBytes
from mixchat.text.form.constraint import ConstraintCompiler, StartConstraint
from mixchat.text.form.grammar import checked_lark, lark_from_gbnf
from mixchat.text.form.output_constraint import OutputConstraint
from mixchat.text.form.schema import schema_grammar

STOP = 256
# A value that may end here does so often: else strings, numbers and lists grow without a bound.
_ENDINGS = frozenset(b'"]},0')


class ByteTokenizer:
    """A tokenizer as far as forms use it; `first` has tokens with other bytes at a text's start."""

    def __init__(self, *more: bytes, first: Mapping[int, bytes] | None = None) -> None:
        words = [*(bytes([byte]) for byte in range(256)), b"", *more]
        self.token_bytes = TokenBytes(words, dict(first or {}))


def json_schema(schema: object) -> OutputConstraint:
    return OutputConstraint(schema_grammar(json.dumps(schema)))


def json_object() -> OutputConstraint:
    return json_schema({"type": "object"})


def lark_grammar(text: str) -> OutputConstraint:
    return OutputConstraint(checked_lark(text))


def gbnf_grammar(text: str) -> OutputConstraint:
    return OutputConstraint(lark_from_gbnf(text))


@cache
def byte_compiler() -> ConstraintCompiler:
    return ConstraintCompiler(ByteTokenizer(), {STOP})  # type: ignore[arg-type]


def compiled(form: OutputConstraint, tokenizer: ByteTokenizer | None = None) -> StartConstraint:
    if tokenizer is None:
        return byte_compiler().compile(form)
    return ConstraintCompiler(tokenizer, {STOP}).compile(form)  # type: ignore[arg-type]


def has_form(form: StartConstraint, text: str) -> bool:
    """Return whether a text has a form, after which an answer may end."""
    constraint = form()
    taken = all(constraint.accepts(byte) == "taken" for byte in text.encode())
    return taken and bool(constraint.allowed()[STOP])


def random_text(form: StartConstraint, seed: int, longest: int = 2000) -> str | None:
    """Return a random text of a form, None if it has no end within `longest` bytes."""
    choose, constraint, data = random.Random(seed), form(), bytearray()
    while len(data) < longest:
        allowed = constraint.allowed().nonzero().flatten().tolist()
        endings = [token for token in allowed if token == STOP or token in _ENDINGS]
        token = choose.choice(endings if endings and choose.random() < 0.4 else allowed)
        constraint.accept(token)
        if token == STOP:
            return data.decode()
        data.append(token)
    return None
