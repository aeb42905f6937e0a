"""Schemas in the field format of Ollama's API."""

from typing import Any

from raw_http import Response, exchange, request
from scripted_model import take_any_form

from mixchat.base.errors import UsageError
from mixchat.face.request import FormError
from mixchat.text.form.output_constraint import checked_schema

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


class Compiler:
    """Records the schemas that it can compile. With an error it can compile none."""

    def __init__(self, error: FormError | None = None) -> None:
        self.error = error
        self.asked: list[Any] = []
        self.grammars: list[str] = []

    def __call__(self, form: Any, at_end: Any = None) -> Any:
        self.asked.append(form)
        if self.error is not None:
            raise self.error
        try:
            self.grammars.append(checked_schema(form).grammar)
        except UsageError as error:
            raise FormError(str(error), hint=error.hint) from None
        return take_any_form(form)


def ask(serve, compiler: Compiler, schema: Any) -> Response:
    served = serve(compile_form=compiler)
    body = {"prompt": "a", "format": schema, "stream": False}
    return exchange(served, request("/api/generate", body))


def test_the_objects_are_closed(serve):
    """Schemas of pydantic leave objects open, so that a small model added properties to the end."""
    compiler = Compiler()
    assert ask(serve, compiler, SCHEMA).status == 200
    assert compiler.asked == [SCHEMA]
    assert '"additionalProperties": false' in compiler.grammars[0]


def test_a_schema_that_would_end_the_process_is_refused(serve):
    """The closed schema was checked in the server itself, whose stack overflowed."""
    chain = {f"d{n}": {"items": {"$ref": f"#/$defs/d{n + 1}"}} for n in range(2000)}
    schema = {"properties": {"a": {"$ref": "#/$defs/d0"}}, "$defs": {**chain, "d2000": {}}}
    response = ask(serve, Compiler(), schema)
    assert response.status == 400
    assert "the schema is too deeply nested" in response.json["error"]


def test_a_schema_that_exceeds_a_limit_is_compiled_once(serve):
    compiler = Compiler(FormError("the schema takes too long", hint="Use fewer patterns."))
    assert ask(serve, compiler, SCHEMA).status == 400
    assert compiler.asked == [SCHEMA]


def test_a_schema_that_is_too_large_is_not_compiled(serve):
    compiler = Compiler()
    response = ask(serve, compiler, {**SCHEMA, "description": "x" * 200_000})
    assert (response.status, compiler.asked) == (400, [])
