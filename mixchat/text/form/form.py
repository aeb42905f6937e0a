"""A form that an answer can be held to: any JSON object, a JSON schema, or a grammar."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mixchat.base.errors import UsageError
from mixchat.text.form.gbnf import lark_from_gbnf, line_in_gbnf
from mixchat.text.form.grammar_fault import Fault, find_fault, grammar_error
from mixchat.text.form.schema_fault import raise_schema_fault
from mixchat.text.form.schema_tree import depth_of, tightened

# Between two parts of JSON: nothing, a space, or a new line with its indent. Without a bound, a
# model can emit blanks until its answer is cut off.
_BLANKS = r"( |\n[ \t]{0,20})?"
# Of values of a schema. llguidance recurses without a limit where references are followed, and its
# stack ended at 3,200 at the earliest, with the process.
_DEEPEST = 1000


@dataclass(frozen=True)
class Form:
    """A form that was checked.

    grammar: in llguidance's kind of Lark; schema: the JSON schema that it stands for, if any;
    text: the grammar as it was given, for a server.
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


def json_object() -> Form:
    """Return the form of any JSON object."""
    return _form({"type": "object"})


def json_schema(schema: object) -> Form:
    """Return the form of the JSON that a schema allows; properties come in its order.

    Raises `UsageError` with a JSON pointer, such as #/properties/age, where the schema cannot be
    met or asks for something that is not supported. It is never met in part.
    """
    if not isinstance(schema, dict):
        raise UsageError("a JSON schema has to be an object")
    try:
        if depth_of(schema) > _DEEPEST:
            raise RecursionError
        raise_schema_fault(schema)
        return _form(schema)
    except RecursionError:
        raise UsageError("the schema is too deeply nested") from None


def _form(schema: dict[str, Any]) -> Form:
    whole = json.dumps({**tightened(schema), "x-guidance": {"whitespace_pattern": _BLANKS}})
    return Form(f"start: %json {whole}", schema)


def lark_grammar(text: str) -> Form:
    """Return the form of the texts that a Lark grammar allows, as llguidance reads it.

    Raises `UsageError` with the line and column where it cannot be read.
    """
    fault = find_fault(text)
    if fault is not None:
        raise grammar_error(fault)
    return Form(text, text=text)


def gbnf_grammar(text: str) -> Form:
    """Return the form of the texts that a grammar of llama.cpp allows.

    Raises `UsageError` with the line where it cannot be read.
    """
    lark = lark_from_gbnf(text)
    fault = find_fault(lark)
    if fault is not None:
        raise grammar_error(Fault(fault.message, line_in_gbnf(text, lark, fault.line)))
    return Form(lark, text=text)
