"""Reads and checks output constraints, which are any JSON object, a JSON schema, or a grammar."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixchat.base.errors import CheckpointError, UsageError
from mixchat.text.form.grammar import (
    find_fault,
    grammar_error,
    lark_from_gbnf,
    looks_like_gbnf,
)
from mixchat.text.form.schema import check_schema, json_rule
from mixchat.text.sandbox import Sandbox, SandboxCall

PROGRAM = "mixchat.text.form.form_child"  # the inside of the sandbox
MAX_CALL = 30_000_000  # bytes of a call to it, of which a vocabulary of 256,000 tokens has 3 MB
# Computing time that compiling may take, for a stranger's request and for the person who waits.
HASTY_S, PATIENT_S = 3.0, 30.0
# The sandbox's end if llguidance overflows its stack, as a long chain of references makes it.
_OVERFLOW = f"ends its process (signal {signal.SIGSEGV:d})"
_MAX_FILE = 4_000_000  # bytes
_SUBJECTS = {"schema": "the schema", "calls": "the schemas"}


@dataclass(frozen=True)
class OutputConstraint:
    """The form that an answer has to have, checked.

    `grammar` is in llguidance's kind of Lark. `schema` is the JSON schema that it stands for, if
    any. `text` is the grammar as it was given, for a server.
    """

    grammar: str
    schema: Mapping[str, Any] | None = None
    text: str | None = None

    def request_fields(self) -> dict[str, Any]:
        """Return the fields of a request that ask a server for this form."""
        if self.schema is None:
            return {"grammar": self.text}
        schema = {"name": "answer", "strict": True, "schema": self.schema}
        return {"response_format": {"type": "json_schema", "json_schema": schema}}


def json_object() -> OutputConstraint:
    """Return the constraint of any JSON object."""
    return _schema_constraint({"type": "object"})


def json_schema(schema: object) -> OutputConstraint:
    """Return the constraint of the JSON that a schema allows, its properties in the same order.

    It runs in this process. Outside of tests `checked_schema` runs it in a sandbox. Raises
    `UsageError` with a JSON pointer, such as #/properties/age, if the schema cannot be met or asks
    for something that is not supported. It is never met in part.
    """
    if not isinstance(schema, dict):
        raise UsageError("a JSON schema has to be an object")
    try:
        check_schema(schema)
        return _schema_constraint(schema)
    except RecursionError:
        raise UsageError("the schema is too deeply nested") from None


def _schema_constraint(schema: dict[str, Any]) -> OutputConstraint:
    return OutputConstraint(f"start: {json_rule(schema)}", schema)


def lark_grammar(text: str) -> OutputConstraint:
    """Return the constraint of the texts that a Lark grammar allows, as llguidance reads it.

    Raises `UsageError` with the line and column if it cannot be read.
    """
    if (fault := find_fault(text)) is not None:
        raise grammar_error(fault)
    return OutputConstraint(text, text=text)


def gbnf_grammar(text: str) -> OutputConstraint:
    """Return the constraint of the texts that a grammar of llama.cpp allows.

    Raises `UsageError` with the line if it cannot be read.
    """
    return OutputConstraint(lark_from_gbnf(text), text=text)


def checked_schema(
    schema: object, seconds: float = PATIENT_S, at_end: ExitStack | None = None
) -> OutputConstraint:
    """Return what `json_schema` returns, computed in a sandbox.

    `at_end` ends the check when it is closed. Raises `UsageError` as `json_schema` does, and if the
    schema takes more than `seconds` of computing or more than 1 GB.
    """
    try:
        text = json.dumps(schema)
    except RecursionError:
        raise UsageError("the schema is too deeply nested") from None
    grammar = _checked("schema", text, seconds, at_end)
    return OutputConstraint(grammar, schema if isinstance(schema, dict) else None)


def checked_calls(
    text: str, seconds: float = PATIENT_S, at_end: ExitStack | None = None
) -> OutputConstraint:
    """Return the constraint of a `CallForm`, computed in a sandbox.

    Raises `UsageError` as `checked_schema` does.
    """
    return OutputConstraint(_checked("calls", text, seconds, at_end))


def checked_grammar(
    text: str, is_gbnf: bool, seconds: float = PATIENT_S, at_end: ExitStack | None = None
) -> OutputConstraint:
    """Return the constraint of a grammar of llama.cpp or of Lark, computed in a sandbox.

    Raises `UsageError` with the line if it cannot be read, or if it takes too much.
    """
    grammar = _checked("gbnf" if is_gbnf else "lark", text, seconds, at_end)
    return OutputConstraint(grammar, text=text)


def _checked(kind: str, text: str, seconds: float, at_end: ExitStack | None) -> str:
    subject = _SUBJECTS.get(kind, "the grammar")
    with closing(Sandbox(PROGRAM)) as sandbox:
        if at_end is not None:
            at_end.callback(sandbox.interrupt)
        return str(asked(sandbox, SandboxCall(subject, "check", (kind, text), seconds, MAX_CALL)))


def asked(sandbox: Sandbox, call: SandboxCall) -> Any:
    """Return the value of a call. Raises `UsageError` if the schema or grammar exceeds a limit."""
    try:
        return sandbox.ask(call)
    except CheckpointError as error:
        hint = "Use fewer or simpler patterns: one more in an allOf can double the work."
        reason = str(error).replace(_OVERFLOW, "is too deeply nested")
        raise UsageError(reason, hint=hint) from None


def read_schema(value: str) -> OutputConstraint:
    """Return the constraint of a JSON schema, or of the file that holds it.

    Raises `UsageError` with the line and column of what is not JSON, or the pointer of what cannot
    be met or used.
    """
    inline = value.lstrip().startswith("{")
    with _named("--schema" if inline else value):
        return checked_schema(_parsed(value if inline else _read(Path(value))))


def read_grammar(path: Path) -> OutputConstraint:
    """Return the constraint of a grammar file, GBNF or Lark by its suffix, else by its content.

    Raises `UsageError` as `checked_grammar` does.
    """
    with _named(str(path)):
        text, suffix = _read(path), path.suffix.lower()
        is_gbnf = suffix == ".gbnf" or (suffix != ".lark" and looks_like_gbnf(text))
        return checked_grammar(text, is_gbnf)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Put the name of what is read in front of an error's message."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{name}: {error}", hint=error.hint) from None


def _read(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_FILE + 1)
    except (OSError, ValueError) as error:  # the latter for a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"cannot be read ({reason})") from None
    if len(data) > _MAX_FILE:
        raise UsageError(f"more than {_MAX_FILE // 10**6} MB")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"not UTF-8 at offset {error.start}") from None


def _parsed(text: str) -> object:
    def refuse(constant: str) -> object:
        raise ValueError(f"{constant} is not a number in JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise UsageError(f"not JSON at {place}: {error.msg}") from None
    except RecursionError:
        raise UsageError("too deeply nested") from None
    except ValueError as error:
        raise UsageError(f"not JSON: {error}") from None
