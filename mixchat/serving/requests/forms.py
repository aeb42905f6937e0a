"""The form that an answer has to have: a JSON object, what a JSON schema describes, a grammar."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from mixchat.base.errors import MixchatError
from mixchat.serving.requests.errors import RequestError, to_json
from mixchat.serving.requests.fields import Fields
from mixchat.text.form.grammar import looks_like_gbnf
from mixchat.text.form.output_constraint import (
    HASTY_S,
    OutputConstraint,
    checked_grammar,
    checked_schema,
    json_object,
)

if TYPE_CHECKING:
    from mixchat.engine.sampling import Constraint
    from mixchat.serving.service import Service
    from mixchat.text.form.constraint import ConstraintCompiler, TokenConstraint


MakeConstraint: TypeAlias = "Callable[[], Constraint]"
_LARGEST = 100_000  # bytes of a schema or a grammar; the time for one grows with its square: 2 s
_TYPES = ("text", "json_object", "json_schema")
_KINDS = {"response_format": "schema", "grammar": "grammar"}


class Compile(Protocol):
    """Compiles a JSON schema, a grammar's text, or None for any JSON object.

    Closing `at_end` ends that. Raises `MixchatError` where it cannot. The function that is returned
    makes a constraint, for an answer that is `continued` or is not.
    """

    def __call__(
        self, given: dict[str, Any] | str | None, at_end: ExitStack | None = None
    ) -> Callable[..., Constraint]: ...


def read_response_format(
    fields: Fields, compile_form: Compile, *, before: Sequence[int] = (), continued: bool
) -> MakeConstraint | None:
    """Take `response_format` and `grammar`, which is the field of llama.cpp's server.

    Return what makes the constraint, None for text of any form.

    before: the tokens of an answer's beginning, which has to have the form, too; continued: whether
    the answer continues the text of its prompt.

    Raises `RequestError` where the format is unknown, or its schema cannot be read or met.
    """
    given, grammar = fields.fields("response_format"), fields.text("grammar")
    if grammar:
        if given is not None:
            fields.refuse("grammar", "and response_format exclude each other")
        if len(grammar) > _LARGEST:
            fields.refuse("grammar", f"is too large: {_LARGEST} bytes are taken at most")
        return partial(_compiled("grammar", compile_form, grammar), before, continued=continued)
    if given is None:
        return None
    kind, schema = given.text("type"), None
    if kind not in _TYPES:
        given.wrong("type", f"one of {', '.join(_TYPES)}", kind)
    if kind == "json_schema":
        schema = _schema(given)
    given.end()
    if kind == "text":
        return None
    compiled = _compiled("response_format", compile_form, schema)
    return partial(compiled, before, continued=continued)


def _compiled(
    field: str, compile_form: Compile, form: dict[str, Any] | str | None
) -> Callable[..., Constraint]:
    try:
        return compile_form(form)
    except MixchatError as error:
        message = f"{field}: {error}{'. ' + error.hint if error.hint else ''}"
        raise RequestError(message, param=field, code=f"invalid_{_KINDS[field]}") from None


def _schema(given: Fields) -> dict[str, Any]:
    about = given.fields("json_schema")
    if about is None:
        given.refuse("json_schema", "is missing", "missing_required_parameter")
    about.ignore("name", "description")
    about.flag("strict")  # every schema is followed to the letter
    schema = about.take("schema")
    if not isinstance(schema, dict):
        about.wrong("schema", "an object", schema)
    if len(to_json(schema)) > _LARGEST:
        about.refuse("schema", f"is too large: {_LARGEST} bytes are taken at most")
    about.end()
    return schema


def no_forms(given: dict[str, Any] | str | None, at_end: ExitStack | None = None) -> MakeConstraint:
    """Refuse every form, where there is nothing that could enforce one."""
    raise RequestError(
        "response_format: only text is available on this server",
        param="response_format",
        code="unsupported_value",
    )


_MOST_KEPT = 64  # forms; programs ask with the same schema again and again


def forms_of(service: Service, seconds: float = HASTY_S) -> Compile:
    """Return what compiles the forms of a service's answers.

    Each may take so many seconds of computing.
    """
    checked: dict[str, OutputConstraint] = {}

    @cache
    def compiler() -> ConstraintCompiler:
        from mixchat.text.form.constraint import ConstraintCompiler

        return ConstraintCompiler(service.tokenizer, service.template.stop_ids, seconds)

    def check(given: dict[str, Any] | str, at_end: ExitStack | None) -> OutputConstraint:
        if isinstance(given, dict):
            return checked_schema(given, seconds, at_end)
        return checked_grammar(given, looks_like_gbnf(given), seconds, at_end)

    def compile_form(
        given: dict[str, Any] | str | None, at_end: ExitStack | None = None
    ) -> Callable[..., TokenConstraint]:
        if given is None:
            return compiler().compile(json_object()).start
        key = json.dumps(given)
        if key not in checked:
            form = check(given, at_end)
            if len(checked) >= _MOST_KEPT:
                checked.clear()
            checked[key] = form
        return compiler().compile(checked[key]).start

    return compile_form
