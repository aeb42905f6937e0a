"""Changes of schemas."""

import json

import pytest

from mixchat.base.errors import UsageError
from mixchat.text.form.schema import check_schema, checked_closed, closed, schema_grammar

TEXT = {"type": "string"}
NAMED = {"type": "object", "properties": {"name": TEXT}}
CLOSED = {**NAMED, "additionalProperties": False}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (NAMED, CLOSED),
        ({"type": "array", "items": NAMED}, {"type": "array", "items": CLOSED}),
        (
            {"$defs": {"a": NAMED}, "anyOf": [{"$ref": "#/$defs/a"}, TEXT]},
            {"$defs": {"a": CLOSED}, "anyOf": [{"$ref": "#/$defs/a"}, TEXT]},
        ),
        (
            {"properties": {"properties": NAMED}},
            {"properties": {"properties": CLOSED}, "additionalProperties": False},
        ),
        (
            {"allOf": [{**NAMED, "required": ["name"]}, {"properties": {"age": TEXT}}]},
            {
                "allOf": [
                    {**NAMED, "required": ["name"]},
                    {"properties": {"age": TEXT}},
                    {"properties": {"name": {}, "age": {}}, "additionalProperties": False},
                ]
            },
        ),
        (
            {**NAMED, "anyOf": [{"properties": {"a": TEXT}, "required": ["a"]}]},
            {
                **NAMED,
                "anyOf": [{"properties": {"a": TEXT}, "required": ["a"]}],
                "allOf": [{"properties": {"name": {}, "a": {}}, "additionalProperties": False}],
            },
        ),
    ],
)
def test_closed_objects_have_the_named_properties_alone(given, expected):
    assert closed(given) == expected
    check_schema(expected)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {**NAMED, "additionalProperties": True},
        {**NAMED, "additionalProperties": TEXT},
        {"enum": [NAMED]},
        {**NAMED, "allOf": [{"properties": {"age": TEXT}, "additionalProperties": True}]},
    ],
)
def test_objects_that_may_have_other_properties_stay_open(schema):
    assert closed(schema) == schema
    check_schema(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"properties": ["a"]},
        {"allOf": 5},
        {**NAMED, "allOf": 5},
        {**NAMED, "required": [{}]},
        {**NAMED, "$ref": 5},
        {**NAMED, "$ref": "#/$defs/missing"},
        {**NAMED, "allOf": [{"$ref": "#"}]},
        {"$defs": {"a": {**NAMED, "allOf": [{"$ref": "#/$defs/a"}, NAMED]}}, "$ref": "#/$defs/a"},
    ],
)
def test_a_schema_that_cannot_be_closed_is_refused_as_it_is_written(schema):
    """A malformed part, or a reference to itself beside other keys, is neither hidden nor fatal."""
    with pytest.raises(UsageError, match="cannot be used at #"):
        schema_grammar(json.dumps(schema))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {}, "minProperties": 1},
        {**NAMED, "const": {"age": 1}},
    ],
)
def test_the_objects_stay_open_if_the_schema_could_not_be_met_otherwise(schema):
    assert checked_closed(schema) == schema


def test_the_grammar_of_a_schema_has_closed_objects():
    """Schemas of pydantic leave objects open, so that a small model added properties to the end."""
    assert '"additionalProperties": false' in schema_grammar(json.dumps(NAMED))
    opened = schema_grammar(json.dumps({**NAMED, "additionalProperties": True}))
    assert '"additionalProperties": true' in opened
