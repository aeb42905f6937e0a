"""Checks forms in a sandbox, which bounds the time and the memory that one may take."""

from __future__ import annotations

import json
from contextlib import ExitStack, closing
from typing import Any

from mixchat.base.errors import CheckpointError, UsageError
from mixchat.text.form.form import Form
from mixchat.text.sandbox import Request, Sandbox

PROGRAM = "mixchat.text.form.form_child"
LARGEST = 30_000_000  # bytes of a request to the sandbox; a vocabulary of 256,000 tokens has 3 MB
_HINT = "Use fewer or simpler patterns: one more in an allOf can double the work."
# Seconds of computing that a form may take to compile: of a stranger, and of the person who waits.
HASTY_S, PATIENT_S = 3.0, 30.0


def checked_schema(
    schema: object, seconds: float = PATIENT_S, at_end: ExitStack | None = None
) -> Form:
    """Return the form of the JSON that a schema allows; properties come in its order.

    `at_end` ends the check when it is closed. Raises `UsageError` as `form.json_schema` does, and
    where the schema takes more than `seconds` of computing or more than 1 GB.
    """
    try:
        text = json.dumps(schema)
    except RecursionError:
        raise UsageError("the schema is too deeply nested") from None
    grammar = _checked("schema", text, seconds, at_end)
    return Form(grammar, schema if isinstance(schema, dict) else None)


def checked_grammar(
    text: str, is_gbnf: bool, seconds: float = PATIENT_S, at_end: ExitStack | None = None
) -> Form:
    """Return the form of the texts that a grammar of llama.cpp or of Lark allows.

    Raises `UsageError` with the line where it cannot be read, and for one that takes too much.
    """
    return Form(_checked("gbnf" if is_gbnf else "lark", text, seconds, at_end), text=text)


def asked(sandbox: Sandbox, request: Request) -> Any:
    """Return the value of a request; a form that exceeds a limit is a fault of who wrote it."""
    try:
        return sandbox.ask(request)
    except CheckpointError as error:
        raise UsageError(str(error), hint=_HINT) from None


def _checked(kind: str, text: str, seconds: float, at_end: ExitStack | None) -> str:
    """Return the grammar of a form."""
    subject = "the schema" if kind == "schema" else "the grammar"
    with closing(Sandbox(PROGRAM)) as sandbox:
        if at_end is not None:
            at_end.callback(sandbox.interrupt)
        return str(asked(sandbox, Request(subject, "check", (kind, text), seconds, LARGEST)))
