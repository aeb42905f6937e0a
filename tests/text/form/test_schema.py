"""Changes of schemas."""

import pytest

from mixchat.text.form.schema import check_schema, closed

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
    ],
)
def test_closed_objects_have_the_named_properties_alone(given, expected):
    assert closed(given) == expected


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {**NAMED, "additionalProperties": True},
        {**NAMED, "additionalProperties": TEXT},
        {"allOf": [{**NAMED, "required": ["name"]}, {"properties": {"age": TEXT}}]},
        {**NAMED, "anyOf": [{"properties": {"a": TEXT}, "required": ["a"]}]},
        {"enum": [NAMED]},
    ],
)
def test_objects_that_may_have_other_properties_stay_open(schema):
    assert closed(schema) == schema
    check_schema(schema)
