"""The short ends of answers in JSON."""

import json
from typing import Any

import pytest

pytest.importorskip("llguidance")
from jsonschema import Draft202012Validator
from llguidance import LLMatcher

from mixchat.text.form.ending import Ending, Place, short_end
from mixchat.text.form.grammar import OPTIONS, bytes_alone
from mixchat.text.form.schema import schema_grammar

ORDER = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "tags": {"type": "array", "items": {"type": "string"}, "minItems": 2},
        "count": {"type": "integer", "minimum": 5},
        "item": {"enum": ["tea", "milk"]},
        "note": {"type": "string"},
    },
    "required": ["name", "tags", "count", "item"],
}
CHAIN = {
    "$defs": {
        "link": {
            "type": "object",
            "properties": {"next": {"anyOf": [{"$ref": "#/$defs/link"}, {"type": "null"}]}},
            "required": ["next"],
        }
    },
    "$ref": "#/$defs/link",
}


def end_of(schema: dict[str, Any], begun: str) -> str | None:
    matcher = LLMatcher(bytes_alone(), schema_grammar(json.dumps(schema)) + OPTIONS, log_level=0)
    place = Place()
    for byte in begun.encode():
        assert matcher.consume_token(byte)
        place = place.after(byte)
    end = short_end(matcher, place)
    return None if end is None else end.decode()


@pytest.mark.parametrize(
    ("schema", "begun", "most"),
    [
        (ORDER, "", 60),
        (ORDER, '{"na', 60),
        (ORDER, '{"name": "an \\', 60),
        (ORDER, '{"name": "a", "tags": ["}', 40),
        (ORDER, '{"name": "a", "tags": ["b", "c"], "count": 5, "item": "tea", "note": "', 2),
        ({}, "[[[[-", 5),
        (CHAIN, '{"next": {"next": {"next": ', 7),
        ({"type": "string", "minLength": 200}, "", 202),
        ({"type": "string", "pattern": "^(a|b)*cd?[0-9]{3}$"}, '"abab', 5),
        ({"type": "string", "pattern": "^[a-z]{70}x+@[a-z]+\\.com$"}, "", 79),
        ({"type": "string", "format": "email"}, '"some.body', 3),
        ({"type": "string", "format": "date-time"}, '"2026-12', 30),
        ({"type": "number", "multipleOf": 0.5, "minimum": 7.25}, "", 4),
        ({"enum": ["alpha", "beta"]}, '"al', 4),
    ],
)
def test_a_text_is_completed_by_few_bytes(schema, begun, most):
    end = end_of(schema, begun)
    assert end is not None
    Draft202012Validator(schema).validate(json.loads(begun + end))
    assert len(end) <= most


def test_one_token_that_leads_far_from_an_end_is_not_taken():
    """A token can open a part that needs more than is left."""
    long = {f"a long name of a property {number}": {"type": "null"} for number in range(40)}
    part = {"type": "object", "properties": long, "required": [*long]}
    schema = {"type": "object", "properties": {"n": {"type": "array"}, "part": part}}
    grammar = schema_grammar(json.dumps(schema))
    tokens = [*(bytes([byte]) for byte in range(256)), b'"part":{']
    ending = Ending(grammar, tokens, len(tokens), 500)
    assert ending.start([])
    assert ending.take(ord("{"))
    assert not ending.take(256)
    assert ending.forced == [ord("}")]
    assert ending.take(ord("}"))
    assert ending.forced == []
