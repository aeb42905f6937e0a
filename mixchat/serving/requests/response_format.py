"""The form that an answer has to have: any JSON object, or what a JSON schema describes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from mixchat.errors import MixchatError
from mixchat.serving.requests.failures import RequestError, to_json
from mixchat.serving.requests.fields import Fields

if TYPE_CHECKING:
    from mixchat.engine.sampling import Constraint

MakeConstraint: TypeAlias = "Callable[[], Constraint]"
# Compiles a JSON schema, or None for any JSON object; raises `MixchatError` where it cannot. The
# function that it returns makes a constraint, for an answer that is `continued` or is not.
Compile: TypeAlias = "Callable[[dict[str, Any] | None], Callable[..., Constraint]]"
_LARGEST = 100_000  # bytes of a schema; the time to compile one grows with their square: 2 s
_TYPES = ("text", "json_object", "json_schema")


def read_response_format(
    fields: Fields, compile_form: Compile, *, before: Sequence[int] = (), continued: bool
) -> MakeConstraint | None:
    """Take `response_format`; return what makes its constraint, None for text of any form.

    before: the tokens of an answer's beginning, which has to have the form, too; continued: whether
    the answer continues the text of its prompt.

    Raises `RequestError` where the format is unknown, or its schema cannot be read or met.
    """
    given = fields.fields("response_format")
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
    try:
        return partial(compile_form(schema), before, continued=continued)
    except MixchatError as error:
        message = f"response_format: {error}{'. ' + error.hint if error.hint else ''}"
        raise RequestError(message, param="response_format", code="invalid_schema") from None


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


def no_forms(schema: dict[str, Any] | None) -> MakeConstraint:
    """Refuse every form, where there is nothing that could enforce one."""
    raise RequestError(
        "response_format: only text is available on this server",
        param="response_format",
        code="unsupported_value",
    )
