"""Reads and checks output constraints, which are any JSON object, a JSON schema, or a grammar."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mixchat.base.errors import CheckpointError, UsageError, short_message
from mixchat.base.progress import Note, waiting_for
from mixchat.text.form.grammar import looks_like_gbnf
from mixchat.text.literals import refuse_constant
from mixchat.text.sandbox import Sandbox, SandboxCall

PROGRAM = "mixchat.text.form.form_child"  # the inside of the sandbox
MAX_CALL = 30_000_000  # bytes of a call to it; a vocabulary of 256,000 tokens takes 3 MB
# Computing time that compiling may take, for a stranger's request and for the person who waits.
HASTY_S = 3.0
PATIENT_S = 30.0
# The end of the sandbox if llguidance overflows its stack, for example by a long chain of
# references.
_OVERFLOW = f"ends its process (signal {signal.SIGSEGV:d})"
_MAX_FILE = 4_000_000  # bytes
_SUBJECTS = {"schema": "the schema", "calls": "the schemas"}

# Of a token: the form does not allow it, or after it the answer could not end within its limit.
Acceptance = Literal["taken", "wrong", "late"]
Kind = Literal["schema", "calls", "lark", "gbnf"]  # of the text of a constraint


def _ignore(text: str) -> None:
    """Ignore the note that a pipe is silent."""


@dataclass(frozen=True)
class OutputConstraint:
    """The form that an answer has to have, checked.

    `grammar` is in llguidance's kind of Lark. `schema` is the JSON schema that it stands for, if
    any. `text` is the grammar as it was written, for a server.
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


def checked_schema(
    schema: object, seconds: float = PATIENT_S, at_end: ExitStack | None = None
) -> OutputConstraint:
    """Return the constraint of a schema's JSON, with properties in the schema's order.

    `at_end` ends the check when it is closed. Raises `UsageError` as `schema_grammar` does, and if
    the schema takes more than `seconds` of computing or more than 1 GB.
    """
    grammar = checked("schema", schema_text(schema), seconds, at_end).grammar
    return OutputConstraint(grammar, schema if isinstance(schema, dict) else None)


def schema_text(schema: object) -> str:
    """Return a schema as JSON. Raises `UsageError` if it cannot be written so."""
    try:
        return json.dumps(schema, allow_nan=False)
    except RecursionError:
        raise UsageError("the schema is too deeply nested") from None
    except (TypeError, ValueError) as error:
        raise UsageError(f"the schema is not JSON ({short_message(error)})") from None


def checked(
    language: Kind, text: str, seconds: float = PATIENT_S, at_end: ExitStack | None = None
) -> OutputConstraint:
    """Return the constraint of a schema, a `CallForm` or a grammar, computed in a sandbox.

    Raises `UsageError` as `checked_schema` does, for a grammar with the line of its fault.
    """
    # The check runs in a process of its own. In the server's, a schema took 12 GB, and the system
    # ended the server.
    subject = _SUBJECTS.get(language, "the grammar")
    with closing(Sandbox(PROGRAM)) as sandbox:
        if at_end is not None:
            at_end.callback(sandbox.interrupt)
        call = SandboxCall(subject, "check", (language, text), seconds, MAX_CALL)
        return OutputConstraint(str(asked(sandbox, call)), text=text)


def asked(sandbox: Sandbox, call: SandboxCall) -> Any:
    """Return the value of a call. Raises `UsageError` if the schema or grammar exceeds a limit."""
    try:
        return sandbox.ask(call)
    except CheckpointError as error:
        hint = "Use fewer or simpler patterns: one more in an allOf can double the work."
        reason = str(error).replace(_OVERFLOW, "is too deeply nested")
        raise UsageError(reason, hint=hint) from None


def read_schema(value: str, note: Note = _ignore) -> OutputConstraint:
    """Return the constraint of a JSON schema, or of the file or pipe that holds it.

    `note` is called if a pipe is silent. Raises `UsageError` with the line and column at which it
    is no JSON, or with the pointer of the part that cannot be met or used.
    """
    inline = value.lstrip().startswith("{")
    with _named("--schema" if inline else value):
        return checked_schema(_parsed(value if inline else _read(Path(value), note)))


def read_grammar(path: Path, note: Note = _ignore) -> OutputConstraint:
    """Return the constraint of a grammar file, GBNF or Lark by its suffix, else by its content.

    `note` is called if a pipe is silent.
    Raises `UsageError` as `checked` does.
    """
    with _named(str(path)):
        text = _read(path, note)
        suffix = path.suffix.lower()
        is_gbnf = suffix == ".gbnf" or (suffix != ".lark" and looks_like_gbnf(text))
        return checked("gbnf" if is_gbnf else "lark", text)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Put the name of the file or option in front of an error's message."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{name}: {error}", hint=error.hint) from None


def _read(path: Path, note: Note) -> str:
    try:
        with waiting_for(path, note), open(path, "rb") as file:
            data = file.read(_MAX_FILE + 1)
    except (OSError, ValueError) as error:  # `ValueError` for a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"cannot be read ({reason})") from None
    if len(data) > _MAX_FILE:
        raise UsageError(f"more than {_MAX_FILE // 10**6} MB")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"not UTF-8 at offset {error.start}") from None


def _parsed(text: str) -> object:
    try:
        return json.loads(text, parse_constant=refuse_constant)
    except json.JSONDecodeError as error:
        position = f"line {error.lineno}, column {error.colno}"
        raise UsageError(f"not JSON at {position}: {error.msg}") from None
    except RecursionError:
        raise UsageError("too deeply nested") from None
    except ValueError as error:
        raise UsageError(f"not JSON: {error}") from None
