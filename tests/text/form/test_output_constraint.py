"""Output constraints: what a schema or a grammar allows, and the place of its fault."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from form_walks import (
    compiled,
    gbnf_grammar,
    has_form,
    json_object,
    json_schema,
    lark_grammar,
    random_text,
)
from jsonschema import Draft202012Validator
from schema_maker import SchemaMaker

from mixchat.base.errors import UsageError
from mixchat.text.form.output_constraint import checked_schema, read_grammar, read_schema

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}
NEVER = {"type": "integer", "minimum": 5, "maximum": 3}


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ('{"name": "Ada", "age": 36}', True),
        ('{"name":"Ada"}', True),
        ('{\n  "name": "Ada",\n  "age": 36\n}', True),
        ('{"age": 36}', False),
        ('{"name": "Ada", "age": -1}', False),
        ('{"name": "Ada", "job": 1}', False),
        ('{"name": "Ada"', False),
        (' {"name": "Ada"}', False),
        ('{"name": "Ada"}\n', False),
    ],
)
def test_a_schema_allows_what_it_says(text, allowed):
    assert has_form(compiled(json_schema(PERSON)), text) is allowed


@pytest.mark.parametrize("blanks", ["  ", "\n\n", "\n" + 21 * " ", "\t"])
def test_blanks_are_bounded(blanks):
    """A model can emit blanks until its answer is cut off, so there is room for an indent only."""
    for lifted in ({}, {"x-guidance": {"whitespace_pattern": "[ ]*"}}):  # it cannot be
        form = compiled(json_schema({**PERSON, **lifted}))
        assert not has_form(form, f'{{{blanks}"name": "Ada"}}')
        assert has_form(form, "{\n" + 20 * " " + '"name": "Ada"}')


def test_any_json_object_is_an_object():
    form = compiled(json_object())
    for seed in range(5):
        assert isinstance(json.loads(random_text(form, seed) or ""), dict)
    assert has_form(form, '{"a": [1, {"b": null}], "é": "\\n🙂"}')
    assert not any(has_form(form, text) for text in ("[]", "1", '"a"', "{a: 1}", "{'a': 1}"))


@pytest.mark.parametrize("seed", range(40))
def test_random_texts_of_a_generated_schema_are_valid(seed):
    schema = SchemaMaker(seed).schema()
    form = compiled(json_schema(schema))
    for number in range(3):
        text = random_text(form, number)
        assert text is not None
        Draft202012Validator(schema).validate(json.loads(text))


INTEGER, NUMBER, LONG = {"type": "integer"}, {"type": "number"}, "1" * 21


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (INTEGER, ["0", "-5", "1" * 19, "-" + "1" * 19], [LONG, "-" + LONG]),
        ({**INTEGER, "minimum": 1}, ["1", "1" * 19], ["0", LONG]),
        ({**INTEGER, "multipleOf": 3}, ["3", "1" * 18], ["4", "3" * 21]),
        ({"anyOf": [INTEGER, {"type": "string"}]}, ["1", f'"{LONG}"'], [LONG]),
        ({"$ref": "#/$defs/n", "$defs": {"n": INTEGER}}, ["1"], [LONG]),
        ({"type": "array", "items": INTEGER}, ["[1]"], [f"[{LONG}]"]),
        ({"type": "object", "additionalProperties": INTEGER}, ['{"a": 1}'], [f'{{"a": {LONG}}}']),
        ({"minimum": 0}, ["1", '"a"'], [LONG]),
        ({"enum": [92 * 10**17, 1], **INTEGER}, ["92" + "0" * 17, "1"], ["2"]),
        (NUMBER, ["6.02e23", "1" * 24], ["a"]),
        ({**NUMBER, "exclusiveMinimum": 8, "maximum": 8.75}, ["8.01", "8.75"], ["8", "8.0", "9"]),
        ({**NUMBER, "exclusiveMinimum": 0, "maximum": 0.5}, ["0.25"], ["0", "0.0"]),
        ({**NUMBER, "exclusiveMinimum": 8}, ["8.1", "9"], ["8", "8.0", "7"]),
        ({**INTEGER, "exclusiveMinimum": 8}, ["9", "10"], ["8", "7"]),
    ],
)
def test_numbers_have_the_limits_of_a_schema_and_integers_20_digits_at_most(schema, good, bad):
    """A weak model wrote digits until its tokens ended.

    llguidance let 8 pass, although more than 8 and at most 8.75 was asked for.
    """
    form = compiled(json_schema(schema))
    assert [has_form(form, text) for text in good + bad] == [True] * len(good) + [False] * len(bad)


def longest(schema, text, digit="1"):
    """Return how many times a digit may follow a text, 60 at most."""
    constraint = compiled(schema)()
    for byte in text.encode():
        assert constraint.allowed()[byte]
        constraint.accept(byte)
    for count in range(60):
        if not constraint.allowed()[ord(digit)]:
            return count
        constraint.accept(ord(digit))
    return 60


@pytest.mark.parametrize(
    ("schema", "text", "most"),
    [
        ({"type": "number"}, "", 20),
        ({"type": "number"}, "0.", 20),
        ({"type": "number"}, "1.5e-", 20),
        ({"type": "number", "minimum": 0}, "0.", 20),
        ({"type": "object"}, '{"a\\"1": ["1", 0.', 20),
        ({"type": "string"}, '"', 60),
        ({"type": "array"}, '["\\\\", "\\"', 60),
        ({"const": 10**22}, "1", 22),
    ],
)
def test_a_number_has_an_end(schema, text, most):
    """A weak model repeated digits of a fraction until its tokens ended."""
    assert longest(json_schema(schema), text, "0" if "const" in schema else "1") == most


def test_the_digits_of_a_grammar_are_its_own():
    assert longest(lark_grammar("start: /[0-9]+/"), "") == 60


def test_constants_are_not_taken_for_schemas():
    constant = {"exclusiveMinimum": 8, "properties": {"exclusiveMinimum": 8}}
    assert has_form(compiled(json_schema({"const": constant})), json.dumps(constant))


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (NEVER, "met at #: minimum (5) is greater than maximum (3)"),
        (
            {"properties": {"a/b": NEVER}, "required": ["a/b"], "type": "object"},
            "met at #/properties/a~1b: minimum (5) is greater than maximum (3)",
        ),
        (
            {
                "$defs": {"n": NEVER, "list": {"items": {"$ref": "#/$defs/n"}, "minItems": 1}},
                "type": "object",
                "properties": {"a": {"type": "array", "$ref": "#/$defs/list"}},
                "required": ["a"],
            },
            "met at #/$defs/n: minimum (5) is greater than maximum (3)",
        ),
        (
            {"properties": {"a": {"anyOf": [{"type": "string"}, {"not": {}}]}}},
            "used at #/properties/a/anyOf/1: not supported: not",
        ),
        (
            {"additionalProperties": {"pattern": "("}},
            "used at #/additionalProperties: regex parse error: unclosed group",
        ),
        (
            {"$id": "http://x.org", "items": {"$ref": "#/$defs/%25"}, "$defs": {"%": {"type": 5}}},
            "used at #/$defs/%: type must be a string or array of strings",
        ),
        (
            {"properties": {"a": {"$ref": "#/$defs/gone"}}},
            "used at #/properties/a: Pointer '/$defs/gone' does not exist",
        ),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "met at #: incompatible types"),
        ({"enum": []}, "met at #: anyOf is empty"),
        (
            {"items": {"oneOf": [{"type": "number"}, {"type": "integer"}]}},
            "used at #/items: oneOf is only supported where its schemas exclude each other; "
            "use anyOf",
        ),
        ({"uniqueItems": True, "contains": {}}, "used at #: not supported: contains, uniqueItems"),
        ({"const": "\udc80"}, "used at #: lone leading surrogate in hex escape"),
    ],
)  # fmt: skip
def test_a_schema_that_cannot_be_met_or_used_is_refused_with_its_place(schema, message):
    with pytest.raises(UsageError) as error:
        json_schema(schema)
    assert str(error.value) == f"the schema cannot be {message}"


def test_a_part_that_can_be_left_out_need_not_be_met():
    assert has_form(compiled(json_schema({"type": "object", "properties": {"a": NEVER}})), "{}")


NODE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}


@pytest.mark.parametrize(
    "schema",
    [
        {"$defs": {"node": NODE}, "$ref": "#/$defs/node"},
        {"type": "array", "items": {"$ref": "#"}},
        {"type": "object", "properties": {"a": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}},
        # Names, and references that have another root, are none of the pointers.
        {"$ref": "#foo", "$defs": {"A": {"$anchor": "foo", "type": "integer"}}},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$id": "http://x.org/a", "type": "object"}}},
    ],
)
def test_a_schema_that_refers_to_itself_and_has_an_end_is_used(schema):
    assert json_schema(schema).grammar


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def test_a_schema_that_is_too_deep_is_refused():
    with pytest.raises(UsageError, match="the schema"):
        checked_schema(nested(2000))


def chain(count: int, part: Callable[[Any], Any]) -> dict[str, Any]:
    """Definitions, each of which refers to the next one, and the last one to the first."""
    refs = [{"$ref": f"#/$defs/d{(n + 1) % count}"} for n in range(count)]
    return {"$defs": {f"d{n}": part(ref) for n, ref in enumerate(refs)}, "$ref": "#/$defs/d0"}


def test_a_chain_of_many_references_is_used():
    assert json_schema(chain(200, lambda ref: {"properties": {"x": ref}})).grammar


@pytest.mark.parametrize(
    "part",
    [
        lambda ref: {"properties": {"x": {"anyOf": [{"allOf": [ref]}, {"type": "null"}]}}},
        lambda ref: {"additionalProperties": ref},
        lambda ref: {"items": ref},
    ],
)
def test_a_chain_of_references_that_would_end_the_process_is_refused(part):
    """The library's stack overflowed. A request with 2,000 definitions took the server down."""
    with pytest.raises(UsageError, match=r"^the schema is too deeply nested$"):
        checked_schema(chain(5000, part))


@pytest.mark.parametrize("schema", [None, []])
def test_a_schema_has_to_be_an_object(schema):
    with pytest.raises(UsageError, match="has to be an object"):
        json_schema(schema)


@pytest.mark.parametrize(
    ("read", "grammar", "message"),
    [
        (lark_grammar, 'start: "a" b\n', ' at line 1, column 8: unknown name: "b"'),
        (lark_grammar, "start: A\n\nA: /(/", ' at line 3, column 4: invalid regex "(" (in regex): '
         "regex parse error: unclosed group"),
        (lark_grammar, "", ": no start rule found"),
        (lark_grammar, "start: x\nx: y\ny: x", ": no text has this form"),
        (lark_grammar, "start: <foo>", ' at line 1, column 8: unknown special token: "<foo>"'),
        (gbnf_grammar, 'root ::= "a', " at line 1: Unexpected end of input"),
        (gbnf_grammar, 'root ::= "a"\nroot = "b"', " at line 2: Expected ::="),
        (gbnf_grammar, 'root ::= "a"\n\nq ::= zz', " at line 3: Rule 'zz' not found"),
        (gbnf_grammar, 'foo ::= "a"', ": No 'root' rule found"),
        (gbnf_grammar, 'root ::= "a"\nb ::= "c"\nroot ::= "b"',
         " at line 3: the rule root is there twice"),
        (gbnf_grammar, '# c\nroot ::= "a" |\n  other\n\n# d\nother ::= "x" [z-a]',
         ' at line 6: invalid regex "[z-a]" (in regex): regex parse error: invalid character class '
         "range, the start must be <= the end"),
    ],
)  # fmt: skip
def test_a_grammar_that_cannot_be_used_is_refused_with_its_place(read, grammar, message):
    with pytest.raises(UsageError) as error:
        read(grammar)
    assert str(error.value) == f"the grammar cannot be used{message}"


LIST = """\
# A list of things.
root ::= (item ws)+  # and so on
item ::= "- " [^\\n\\x00-\\x1f]{1,20} |
         "* " [a-zé]+ "\\u00df"?
ws ::= "\\n"?
"""


@pytest.mark.parametrize(
    ("grammar", "good", "bad"),
    [
        (
            lark_grammar('start: "yes" | "no" NUMBER\nNUMBER: /[0-9]{1,2}/'),
            ["yes", "no1", "no12"],
            ["", "no", "no123", "yes1", "maybe"],
        ),
        # Forced tokens need the tokenizer itself: nothing is there that could encode text.
        (lark_grammar('%llguidance {"no_forcing": false}\nstart: "abc"'), ["abc"], ["ab"]),
        (
            gbnf_grammar(LIST),
            ["- milk\n- 2 eggs\n", "* zoé", "* abcß"],
            ["milk", "- ", "* ABC", "- a\n\n"],
        ),
    ],
    ids=["Lark", "options that would force tokens", "GBNF"],
)
def test_a_grammar_allows_what_it_says(grammar, good, bad):
    form = compiled(grammar)
    assert [has_form(form, text) for text in good + bad] == [True] * len(good) + [False] * len(bad)


AT_MOST_5 = '{"type": "integer", "maximum": 5}'


@pytest.mark.parametrize("text", [AT_MOST_5, f"\n {AT_MOST_5}\n", f"\ufeff{AT_MOST_5}"])
def test_a_schema_is_read_from_a_file_or_the_command_line(tmp_path, text):
    (tmp_path / "s.json").write_text(text, encoding="utf-8")
    for value in (str(tmp_path / "s.json"), f"  {AT_MOST_5}"):
        form = compiled(read_schema(value))
        assert (has_form(form, "5"), has_form(form, "6")) == (True, False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a": 1,\n "b" 2}', "not JSON at line 2, column 6: Expecting ':' delimiter"),
        (b"", "not JSON at line 1, column 1: Expecting value"),
        (b'{"minimum": NaN}', "not JSON: NaN is not a number in JSON"),
        (b'{"minimum": ' + 5000 * b"1" + b"}", "not JSON: Exceeds the limit"),
        (100_000 * b"[", "too deeply nested"),
        (b'{"a": "\xff"}', "not UTF-8 at offset 7"),
        (b"[1]", "a JSON schema has to be an object"),
        (b'{"type": "foo"}', "the schema cannot be used at #: Invalid type: foo"),
        (4_000_001 * b" ", "more than 4 MB"),
    ],
)
def test_a_schema_that_cannot_be_read_is_refused_with_its_file_and_place(tmp_path, text, message):
    file = tmp_path / "s.json"
    file.write_bytes(text)
    with pytest.raises(UsageError) as error:
        read_schema(str(file))
    assert str(error.value).startswith(f"{file}: {message}")


def test_an_error_of_the_command_line_names_its_flag():
    with pytest.raises(UsageError, match=r"^--schema: not JSON at line 1, column 9: "):
        read_schema('{"type":')


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("g.lark", 'start: "a"'),
        ("g.gbnf", 'root ::= "a"'),
        ("g.txt", '# a comment\n  root ::= "a"'),
        ("g", 'other ::= "b"\nroot ::= "a"'),
    ],
)
def test_the_ending_tells_the_kind_of_a_grammar_or_its_text_does(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    form = compiled(read_grammar(tmp_path / name))
    assert (has_form(form, "a"), has_form(form, "b")) == (True, False)
