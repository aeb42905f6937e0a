"""The form of an answer, from a JSON schema or a grammar."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from mixchat.base.errors import MixchatError
from mixchat.serving.requests.errors import RequestError, to_json
from mixchat.serving.requests.fields import RequestObject, wrong
from mixchat.text.form.call_form import CallForm
from mixchat.text.form.grammar import looks_like_gbnf
from mixchat.text.form.output_constraint import (
    HASTY_S,
    Kind,
    OutputConstraint,
    checked,
    checked_schema,
)

if TYPE_CHECKING:
    from mixchat.engine.sampling import Constraint
    from mixchat.serving.service import Service
    from mixchat.text.form.constraint import ConstraintCompiler, StartConstraint
    from mixchat.text.thinking import ThinkingParser

Form: TypeAlias = "dict[str, Any] | str | CallForm"
MakeConstraint: TypeAlias = "Callable[[ThinkingParser], Constraint]"
_MAX_FORM = 100_000  # bytes of a schema or a grammar, which take 2 s
_MAX_CACHED_FORMS, _MAX_CACHED = 64, 8_000_000  # forms, and characters of all of them


# Compiles a JSON schema, a grammar's text, or calls of tools, until `at_end` is closed. Raises
# `MixchatError`.
Compile: TypeAlias = "Callable[..., StartConstraint]"


def small_form(form: Any) -> Any:
    """Return a schema or a grammar, unless it has too many bytes."""
    size = len(form) if isinstance(form, str) else len(to_json(form))
    if size > _MAX_FORM:
        raise wrong(None, f"is too large: {_MAX_FORM} bytes are taken at most")
    return form


class _JsonSchema(RequestObject):
    ignored = ("name", "description")
    strict: bool = False  # every schema is followed to the letter
    given: Annotated[dict[str, Any], Field(alias="schema"), AfterValidator(small_form)]


class ResponseFormat(RequestObject):
    """The field response_format."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JsonSchema | None = Field(None, validate_default=True)

    @field_validator("json_schema", mode="before")
    @classmethod
    def _belongs_to_type(cls, given: Any, info: ValidationInfo) -> Any:
        has_schema = info.data.get("type") == "json_schema"
        if has_schema and given is None:
            raise wrong("missing_required_parameter", "is missing")
        if given is not None and not has_schema:
            raise wrong("unknown_parameter", "belongs to the type json_schema alone")
        return given


def schema_format(schema: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    """Return the field response_format for a JSON schema."""
    return {"type": "json_schema", "json_schema": {"schema": schema, **more}}


class FormFields(RequestObject):
    """The fields that give an answer its form. `grammar` is the field of llama.cpp's server."""

    response_format: ResponseFormat | None = None
    grammar: Annotated[str, AfterValidator(small_form)] = ""

    @field_validator("grammar")
    @classmethod
    def _stands_alone(cls, given: str, info: ValidationInfo) -> str:
        if given and info.data.get("response_format") is not None:
            raise wrong(None, "and response_format exclude each other")
        return given

    def answer_schema(self) -> dict[str, Any] | None:
        """Return the schema in response_format, None for text."""
        form = self.response_format
        if form is None or form.type == "text":
            return None
        return {"type": "object"} if form.json_schema is None else form.json_schema.given


def constraint_of(
    fields: FormFields, compile_form: Compile, before: Sequence[int], continued: bool
) -> MakeConstraint | None:
    """Return what makes the constraint of an answer, None for text of any form.

    The tokens `before` begin the answer. `continued` tells whether it continues its prompt. Raises
    `RequestError` if the form cannot be read or met.
    """
    given = fields.grammar or fields.answer_schema()
    if given is None:
        return None
    if fields.grammar:
        start = compiled(given, compile_form, "grammar", "invalid_grammar")
    else:
        start = compiled(given, compile_form, "response_format", "invalid_schema")
    return lambda parser: start(before, continued=continued)


def compiled(form: Form, compile_form: Compile, field: str, code: str) -> StartConstraint:
    """Return a compiled form. Raises `RequestError` about its field."""
    try:
        return compile_form(form)
    except MixchatError as error:
        message = f"{field}: {error}{'. ' + error.hint if error.hint else ''}"
        raise RequestError(message, param=field, code=code) from None


def forms_of(service: Service, seconds: float = HASTY_S) -> Compile:
    """Return what compiles forms for a service, each within so many seconds."""
    known: dict[bytes, tuple[OutputConstraint, int]] = {}  # by hash, with its characters

    @cache
    def compiler() -> ConstraintCompiler:
        from mixchat.text.form.constraint import ConstraintCompiler

        return ConstraintCompiler(service.tokenizer, service.template.stop_ids, seconds)

    def compile_form(given: Form, at_end: ExitStack | None = None) -> StartConstraint:
        text = given.to_text() if isinstance(given, CallForm) else json.dumps(given)
        key = hashlib.sha256(text.encode()).digest()
        form, _ = known.get(key, (None, 0))
        if form is None:
            if isinstance(given, CallForm):
                form = checked("calls", text, seconds, at_end)
            elif isinstance(given, dict):
                form = checked_schema(given, seconds, at_end)
            else:
                kind: Kind = "gbnf" if looks_like_gbnf(given) else "lark"
                form = checked(kind, given, seconds, at_end)
            size = len(text) + len(form.grammar)
            if size <= _MAX_CACHED:
                cached = sum(size for _, size in list(known.values()))
                if len(known) >= _MAX_CACHED_FORMS or cached + size > _MAX_CACHED:
                    known.clear()
                known[key] = form, size
        return compiler().compile(form)

    return compile_form
