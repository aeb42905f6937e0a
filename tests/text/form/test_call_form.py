"""Calls keep to their tools' schemas, whatever a model would like to write."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jsonschema
import pytest
from fed_answers import answer_read_by, feed
from form_walks import STOP
from mistral_texts import VERSIONS, their_ids

from mixchat.base.errors import UsageError
from mixchat.face.running_answer import RunningAnswer
from mixchat.text.choose import load_template, load_tokenizer
from mixchat.text.detokenizer import TokenBytes
from mixchat.text.form.call_form import CallForm, call_grammar
from mixchat.text.form.constraint import CallConstraint, ConstraintCompiler
from mixchat.text.form.output_constraint import OutputConstraint
from mixchat.text.literals import literal_of
from mixchat.text.messages import Message
from mixchat.text.thinking import ThinkingFormat
from mixchat.text.tool_call import Tool, ToolCall
from mixchat.text.tool_formats import FORMATS
from mixchat.text.tool_parser import answer_parser

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Oslo", "Rome}\n"]},
        "days": {"type": "integer", "maximum": 9},
    },
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = (Tool("weather", "x", SCHEMA), Tool("now"))
SCHEMAS = {"weather": SCHEMA, "now": {"type": "object", "maxProperties": 0}}
WORDS = (b">\n", b'>{"', b">x", b"tool_call", b"hello ")
HARMONY = ("<|channel|>", "<|message|>", "<|constrain|>")


class Tokens:
    """A token for each byte, for some words, and for control tokens, which have no text."""

    def __init__(self, *controls: str) -> None:
        self.words = [*(bytes([i]) for i in range(256)), b"", *WORDS, *(b"" for _ in controls)]
        first = len(self.words) - len(controls)
        self.control_tokens = {name: first + i for i, name in enumerate(controls)}
        self.token_bytes = TokenBytes(self.words, {})
        self.compiler = ConstraintCompiler(self, {STOP})  # type: ignore[arg-type]

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self.words[i] for i in ids).decode("utf-8", "replace")

    def encode(self, text: str) -> list[int]:
        """Return the ids of words and control tokens, else of bytes."""
        known = {word.decode(): 257 + i for i, word in enumerate(WORDS)} | self.control_tokens
        ids = list[int]()
        while text:
            word = next((word for word in known if text.startswith(word)), None)
            ids += text[0].encode() if word is None else [known[word]]
            text = text[len(word or text[0]) :]
        return ids


# Answers take the sandbox of an earlier one, as they do in a chat. A new one takes .1 s.
tokens_of = functools.cache(Tokens)


def compiled(form: CallForm, tokens: Tokens) -> Any:
    return tokens.compiler.compile(OutputConstraint(call_grammar(form.to_text())))


def walk(form: CallForm, tokens: Any, seed: int, said: str = "") -> tuple[RunningAnswer, Any]:
    """An answer that begins with what is `said` and continues with random tokens that may come."""
    thinking = ThinkingFormat("harmony") if form.format.kind == "harmony" else None
    parser = answer_parser(thinking, form.format, tokens, (), offered=form.tools)
    answer = answer_read_by(parser, tokens, {STOP})
    constraint: Any = compiled(form, tokens)(continued=True)
    if not form.must_call:
        constraint = CallConstraint(constraint, parser, form.format.opening, tokens)
    choose = random.Random(seed)
    script = tokens.encode(said)
    while not answer.has_ended:
        mask = constraint.allowed()
        if script:
            token = script.pop(0)
            assert mask is None or mask[token], said
        elif mask is None:
            token = STOP
        else:
            allowed = mask.nonzero().flatten().tolist()
            marks = tokens.control_tokens.values()
            endings = [i for i in allowed if i in (STOP, *b'"},]', *marks)]
            token = choose.choice(endings if endings and choose.random() < 0.5 else allowed)
        constraint.accept(token)
        feed(answer, token)
    message = answer.message()
    assert message is not None
    return answer, message.calls


@pytest.mark.parametrize(
    ("said", "parallel"), [(None, True), ("Hm. ", False)], ids=["must, parallel", "may, single"]
)
@pytest.mark.parametrize(
    ("name", "controls"),
    [
        ("tags", ()),
        ("tags", ("<tool_call>", "</tool_call>")),
        ("mistral", ("[TOOL_CALLS]",)),
        ("mistral-args", ("[TOOL_CALLS]", "[ARGS]")),
        ("mistral-args", ()),
        ("mistral-ids", ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")),
        ("granite", ("<|tool_call|>",)),
        ("granite-text", ()),
        ("qwen-coder", ()),
        ("qwen-coder", ("<tool_call>", "</tool_call>")),
        ("glm", ()),
        ("glm", FORMATS["glm"].marks),
        ("glm-inline", FORMATS["glm-inline"].marks),
        ("gemma", ()),
        ("gemma", FORMATS["gemma"].marks),
        ("lfm", ()),
        ("lfm", FORMATS["lfm"].marks),
        ("harmony", HARMONY),
    ],
)
def test_random_tokens_make_calls_that_keep_to_the_schemas(name, controls, said, parallel):
    tokens = tokens_of(*controls)
    form = CallForm(FORMATS[name], TOOLS, tokens.control_tokens, said is None, parallel)
    counts = set()
    for seed in range(2):
        begun = "" if said is None else said + ("" if name == "harmony" else FORMATS[name].opening)
        if name == "harmony" and said:
            begun = "<|channel|>analysis<|message|>Hm.<|channel|>commentary to=functions"
        answer, calls = walk(form, tokens, seed, begun)
        assert answer.reason == "tool_calls"
        assert answer.text == (said or "").strip() * (name != "harmony")
        for call in calls:
            jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
        counts.add(len(calls))
    assert (parallel and name != "harmony") or counts == {1}


@pytest.mark.parametrize("version", VERSIONS)
def test_calls_that_mistral_common_writes_are_allowed_and_found(version, tmp_path):
    """They were text, as was the thinking before them."""
    mistral = VERSIONS[version]
    tokenizer: Any = load_tokenizer(mistral.write(tmp_path / "x"))
    template = load_template(tmp_path / "x", tokenizer)
    assert template.tools is not None
    arguments = '{"city": "Rome}\\n", "days": 3}'
    calls = (ToolCall("abcdefgh1", "weather", arguments), ToolCall("abcdefgh2", "now", "{}"))
    question = Message("user", "Hi")
    answer = Message("assistant", "So:", thinking="Hm." if mistral.thinks else "", calls=calls)
    result = Message("tool", "", call_id="abcdefgh2")
    talk = [question, answer, replace(result, call_id="abcdefgh1"), result]
    ids = their_ids(mistral.theirs(), talk, thinks=mistral.thinks)
    start = ids.index(tokenizer.control_tokens["[/INST]"]) + 1
    said = ids[start : ids.index(tokenizer.eos_id)]
    known = {name: tokenizer.control_tokens.get(name) for name in template.tools.marks if name}
    form = CallForm(template.tools, TOOLS, {name: i for name, i in known.items() if i})
    parser = answer_parser(template.thinking, form.format, tokenizer, ids[:start], offered=TOOLS)
    constraint: Any = ConstraintCompiler(tokenizer, {tokenizer.eos_id}).compile(
        OutputConstraint(call_grammar(form.to_text()))
    )(continued=True)
    constraint = CallConstraint(constraint, parser, form.format.opening, tokenizer)
    state = answer_read_by(parser, tokenizer, {tokenizer.eos_id})
    for token in (*said, tokenizer.eos_id):
        mask = constraint.allowed()
        assert mask is None or mask[token]
        constraint.accept(token)
        feed(state, token)
    assert (state.text, state.thinking) == ("So:", answer.thinking)
    message = state.message()
    assert message is not None
    found = message.calls
    assert [(call.name, call.arguments) for call in found] == [
        (call.name, call.arguments) for call in calls
    ]
    assert version != "v11" or found == calls


TEXT = "if a < 2:\n    say('\"Zürich\"')\n</p"
WRITE = Tool("write", None, {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "lines": {"$ref": "#/$defs/n"},
        "more": {"type": ["string", "null"]},
    },
    "required": ["text"],
    "$defs": {"n": {"type": "array", "items": {"type": "integer"}}},
})  # fmt: skip
WRITTEN = {
    "qwen-coder": """<tool_call>
<function=write>
<parameter=text>
{}
</parameter>
<parameter=lines>
[1, 2]
</parameter>
<parameter=more>
"5"
</parameter>
</function>
</tool_call>""",
    "glm": """<tool_call>write
<arg_key>text</arg_key>
<arg_value>{}</arg_value>
<arg_key>lines</arg_key>
<arg_value>[1, 2]</arg_value>
<arg_key>more</arg_key>
<arg_value>"5"</arg_value>
</tool_call>""",
    "glm-inline": "<tool_call>write<arg_key>text</arg_key><arg_value>{}</arg_value>"
    "<arg_key>lines</arg_key><arg_value>[1, 2]</arg_value>"
    '<arg_key>more</arg_key><arg_value>"5"</arg_value></tool_call>',
}
LITERALS = {
    "gemma": '<|tool_call>call:write{{lines:[1,2],more:<|"|>5<|"|>,text:{}}}<tool_call|>',
    "lfm": '<|tool_call_start|>[write(text={}, lines=[1, 2], more="5")]<|tool_call_end|>',
}


FORMS = (*WRITTEN, *LITERALS)


def call_with(name: str, text: str) -> str:
    """Return a call of `write` in a form whose texts have no quotes of JSON."""
    if name in WRITTEN:
        return WRITTEN[name].format(text)
    return LITERALS[name].format(literal_of(text, FORMATS[name].quote))


@pytest.mark.parametrize("controls", [True, False])
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("text", [TEXT, ""])
def test_texts_stand_between_tags_or_as_literals(name, controls, text):
    format = FORMATS[name]
    tokens = tokens_of(*format.marks if controls else ())
    form = CallForm(format, [WRITE], tokens.control_tokens, parallel=False)
    said = call_with(name, text)
    answer, (call,) = walk(form, tokens, 0, said)
    assert (call.name, answer.reason, answer.text) == ("write", "tool_calls", "")
    assert json.loads(call.arguments) == {"text": text, "lines": [1, 2], "more": "5"}
    if name in LITERALS:
        five, nothing, true = (literal_of(value, format.quote) for value in ("5", None, True))
        walk(form, tokens, 0, said.replace(five, nothing))
        with pytest.raises(AssertionError, match="call"):
            walk(form, tokens, 0, said.replace(five, true))


@pytest.mark.parametrize("controls", [True, False])
@pytest.mark.parametrize("name", FORMS)
def test_a_text_has_at_most_its_longest_length_in_characters(name, controls):
    """`maxLength` had no effect in the forms whose texts have no quotes of JSON."""
    format = FORMATS[name]
    tokens = tokens_of(*format.marks if controls else ())

    def write(longest: int) -> None:
        properties = WRITE.arguments | {"text": {"type": "string", "maxLength": longest}}
        schema = {**(WRITE.parameters or {}), "properties": properties}
        tool = Tool("write", None, {**schema, "additionalProperties": False})
        form = CallForm(format, [tool], tokens.control_tokens, parallel=False)
        walk(form, tokens, 0, call_with(name, TEXT))

    write(len(TEXT))
    with pytest.raises(AssertionError, match="call"):
        write(len(TEXT) - 1)


NESTED = {
    "type": "object",
    "properties": {
        "point": {
            "type": "object",
            "properties": {"y": {"type": "integer"}, "X": {"type": "boolean"}},
            "required": ["X"],
        },
        "tree": {"$ref": "#/$defs/tree"},
        "either": {"anyOf": [{"type": "null"}, {"type": "array", "items": {"type": "string"}}]},
        "any": {},
        "one": {"enum": ["a", 1, None, ["b"]]},
    },
    "required": ["point", "one", "either"],
    "additionalProperties": False,
    "$defs": {"tree": {"type": "object", "properties": {"next": {"$ref": "#/$defs/tree"}}}},
}


@pytest.mark.parametrize("name", LITERALS)
def test_random_literals_keep_to_a_nested_schema(name):
    tokens = tokens_of(*FORMATS[name].marks)
    known = tokens.control_tokens
    form = CallForm(FORMATS[name], [Tool("f", None, NESTED)], known, must_call=True, parallel=False)
    for seed in range(6):
        answer, calls = walk(form, tokens, seed, FORMATS[name].opening)
        assert answer.reason == "tool_calls"
        jsonschema.validate(json.loads(calls[0].arguments), NESTED)


def written(name: str, schema: Any, strict: bool = False) -> list[Any]:
    """Return the arguments of random calls of a tool with this schema, in a form."""
    tokens = tokens_of(*FORMATS[name].marks)
    tool = Tool("f", None, {**schema, "additionalProperties": False}, strict)
    form = CallForm(FORMATS[name], [tool], tokens.control_tokens, must_call=True, parallel=False)
    answers = [walk(form, tokens, seed) for seed in range(4)]
    return [json.loads(calls[0].arguments) for _, calls in answers]


LIST_OF_BOOLEANS = {"type": "array", "items": {"type": "boolean"}}


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "harmony"])
@pytest.mark.parametrize(
    "argument",
    [
        # Gemma's form kept to neither bound.
        {**LIST_OF_BOOLEANS, "minItems": 2},
        {**LIST_OF_BOOLEANS, "minItems": 1, "maxItems": 2},
        {**LIST_OF_BOOLEANS, "maxItems": 1},
        {**LIST_OF_BOOLEANS, "maxItems": 0},
        # `maxLength` had no effect next to `enum`.
        {"type": "string", "enum": ["a", "bc"], "maxLength": 1},
        {"type": "string", "enum": ["a", "bc", 5]},
        {"enum": [1, 5, "a"], "type": "integer", "maximum": 3},
    ],
    ids=str,
)
def test_an_argument_keeps_to_the_bounds_of_a_list_and_to_what_other_keys_exclude(name, argument):
    schema = {"type": "object", "properties": {"a": argument}, "required": ["a"]}
    for strict in {False, "items" in argument}:
        for arguments in written(name, schema, strict):
            jsonschema.validate(arguments, schema)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "harmony"])
def test_an_argument_without_a_possible_value_is_left_out(name):
    """Between tags it could be any text."""
    never = {"type": "string", "enum": ["abc"], "maxLength": 1}
    schema = {"type": "object", "properties": {"a": never, "b": {"const": True}}, "required": ["b"]}
    assert all(arguments == {"b": True} for arguments in written(name, schema))


@pytest.mark.parametrize("name", FORMS)
def test_an_argument_that_is_required_but_not_described_is_written(name):
    tokens = tokens_of(*FORMATS[name].marks)
    tool = Tool("f", None, {"type": "object", "properties": {}, "required": ["a"]})
    form = CallForm(FORMATS[name], [tool], tokens.control_tokens, must_call=True, parallel=False)
    for seed in range(4):
        answer, calls = walk(form, tokens, seed, FORMATS[name].opening)
        assert answer.reason == "length" or "a" in json.loads(calls[0].arguments)


@pytest.mark.parametrize(
    "said",
    [
        '<tool_call>\n{"name": "write", "arguments": {"text": "", "lines": [1]}}\n</tool_call>',
        *WRITTEN.values(),
    ],
    ids=["tags", *WRITTEN],
)
def test_an_integer_in_a_call_has_an_end(request, said):
    name = request.node.callspec.id
    form = CallForm(FORMATS[name], [WRITE], parallel=False)
    walk(form, tokens_of(), 0, said)
    with pytest.raises(AssertionError, match="1" * 21):
        walk(form, tokens_of(), 0, said.replace("[1", "[" + "1" * 21))


SHORT_LIST = {"type": "array", "items": {"type": "string", "minLength": 2}}


@pytest.mark.parametrize(
    ("names", "argument", "key"),
    [
        (["glm"], {"type": "string", "minLength": 3}, "minLength"),
        (["glm"], {"type": "string", "pattern": "a"}, "pattern"),
        (["gemma"], {"anyOf": [SHORT_LIST, {"type": "null"}]}, "minLength"),
        (LITERALS, {"anyOf": [{"type": "string"}], "minLength": 2}, "minLength"),
    ],
)
def test_a_strict_tool_is_refused_for_what_the_form_of_its_calls_cannot_keep(names, argument, key):
    schema = {"type": "object", "properties": {"a": argument}}
    for name in names:
        with pytest.raises(UsageError, match=f"the arguments of f: not .* of calls: {key}"):
            call_grammar(CallForm(FORMATS[name], [Tool("f", None, schema, strict=True)]).to_text())
        call_grammar(CallForm(FORMATS[name], [Tool("f", None, schema)]).to_text())


def test_literals_of_python_keep_to_more_than_gemmas():
    schema = {"properties": {"a": {"anyOf": [SHORT_LIST, {"type": "null"}]}}}
    call_grammar(CallForm(FORMATS["lfm"], [Tool("f", None, schema, strict=True)]).to_text())


def test_tags_need_the_names_of_arguments():
    """The model could only call such a tool without arguments, and nothing said so."""
    hidden = {"$ref": "#/$defs/a", "$defs": {"a": {"type": "object", "properties": {"b": {}}}}}
    for schema in (hidden, {"allOf": [hidden["$defs"]["a"]]}):  # type: ignore[index]
        with pytest.raises(UsageError, match=r"form of calls: (\$ref|allOf)"):
            call_grammar(CallForm(FORMATS["glm"], [Tool("f", None, schema)]).to_text())
        call_grammar(CallForm(FORMATS["tags"], [Tool("f", None, schema)]).to_text())


@pytest.mark.parametrize("choices", [{"enum": ["a", None]}, {"enum": ["a", 1]}, {"const": None}])
def test_choices_of_a_text_that_are_none_do_not_spoil_the_grammar(choices):
    """Clients that allow null in a list of choices got "the grammar cannot be used"."""
    schema = {"type": "object", "properties": {"a": {"type": "string", **choices}}}
    for tool in (Tool("f", None, schema), Tool("f", None, schema, strict=True)):
        assert "null" not in call_grammar(CallForm(FORMATS["glm"], [tool]).to_text())


@pytest.mark.parametrize("said", ["<tool_call>\n", '<tool_call>{"'])
def test_what_follows_the_opening_in_its_token_counts(said):
    tokens = tokens_of()
    assert len(tokens.encode(said)) == 3  # "<", "tool_call", and the rest
    answer, calls = walk(CallForm(FORMATS["tags"], TOOLS), tokens, 1, said)
    assert calls
    assert answer.reason == "tool_calls"


@pytest.mark.parametrize(
    "said",
    ['<tool_call>x <tool_call>{"name": "now", "arguments": {"a": 1}}', "a <tool, <|x|> {}"],
    ids=["an opening in a token that cannot begin a call", "no opening"],
)
def test_without_a_call_that_begins_every_token_may_come(said):
    answer, calls = walk(CallForm(FORMATS["tags"], TOOLS), tokens_of(), 0, said)
    assert (answer.text, calls, answer.reason) == (said, (), "stop")


def test_an_answer_has_its_own_form_or_is_a_call():
    form = CallForm(FORMATS["tags"], TOOLS, must_call=True, answer={"enum": ["yes"]})
    kinds = {walk(form, tokens_of(), seed)[0].text for seed in range(6)}
    assert kinds == {"", '"yes"'}


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        (Tool("f", None, {"properties": {"a": {"enum": []}}, "required": ["a"]}),
         "the arguments of f: the schema cannot be met at #/properties/a"),
        (Tool("f", None, {"properties": {"a": {"not": {}}}}, strict=True),
         "the arguments of f: the schema cannot be used at #/properties/a: not supported: not"),
        (Tool("f", None, {"properties": 5}), "the arguments of f: the schema cannot be used"),
    ],
)  # fmt: skip
def test_a_schema_that_cannot_be_kept_is_refused_with_its_tool(tool, message):
    with pytest.raises(UsageError) as error:
        call_grammar(CallForm(FORMATS["tags"], [*TOOLS, tool]).to_text())
    assert str(error.value).startswith(message)


def test_unknown_keys_of_a_schema_have_no_effect_if_it_is_not_strict():
    lenient = {"properties": {"a": {"const": 1, "not": {}, "format": "x"}}, "required": ["a"]}
    form = CallForm(FORMATS["tags"], [Tool("f", None, {**lenient, "additionalProperties": False})])
    assert "lenient" in call_grammar(form.to_text())
    _, (call, *_) = walk(form, tokens_of(), 0, "<tool_call>")
    assert json.loads(call.arguments) == {"a": 1}
