"""Calls of tools are taken apart from the answer, however the text is cut into tokens."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from marked_characters import MarkedCharacters

from mixchat.text.literals import GEMMA as GEMMA_QUOTE
from mixchat.text.literals import literal_of
from mixchat.text.thinking import AnswerText, ThinkingFormat
from mixchat.text.tool_call import ToolCall, joined_calls
from mixchat.text.tool_formats import FORMATS
from mixchat.text.tool_parser import answer_parser

MARKS = (
    *("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|constrain|>", "[TOOL_CALLS]"),
    *("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", '<|"|>'),
    *("<|tool_call_start|>", "<|tool_call_end|>"),
    *("[CALL_ID]", "[ARGS]", "[THINK]", "[/THINK]"),
)
TAGS, HARMONY = ThinkingFormat("tags"), ThinkingFormat("harmony")
CHANNEL, BRACKETS = ThinkingFormat("channel"), ThinkingFormat("brackets")
F = '{"name": "f", "arguments": {"a": "}\\"{", "b": [{"c": 1}]}}'
F_CALL = ("f", '{"a": "}\\"{", "b": [{"c": 1}]}')
G, G_CALL = '{"name": "g.h-i", "arguments": {}}', ("g.h-i", "{}")
TO_G = "<|channel|>commentary to=functions.g.h-i <|constrain|>json<|message|>{}"
ANALYSIS = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
QWEN = ('<function=f>\n<parameter=a>\n}"{\n</parameter>\n<parameter=b>\n[{"c": 1}]\n</parameter>\n'
        '</function>\n')  # fmt: skip
QWEN_G = "<function=g.h-i>\n</function>\n"
GLM = ('<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>}"{</arg_value>\n<arg_key>b</arg_key>\n'
       '<arg_value>[{"c": 1}]</arg_value>\n</tool_call>')  # fmt: skip
GLM_INLINE = ('<tool_call>f<arg_key>a</arg_key><arg_value>}"{</arg_value><arg_key>b</arg_key>'
              '<arg_value>[{"c": 1}]</arg_value></tool_call>')  # fmt: skip
GEMMA = '<|tool_call>call:f{a:<|"|>}"{<|"|>,b:[{c:1}]}<tool_call|>'
GEMMA_G = "<|tool_call>call:g.h-i{}<tool_call|>"
LFM = '<|tool_call_start|>[f(a=\'}"{\', b=[{"c": 1}]), g.h-i()]<|tool_call_end|>'
CUT = '<tool_call>\n{"name": "f", "arguments": {"a": '


def parsed(tools: str | None, thinking: Any, answer: str, cuts: list[int]) -> AnswerText:
    """An answer whose text is cut at these places, and around each mark that counts."""
    tokenizer: Any = MarkedCharacters(MARKS)
    parser = answer_parser(thinking, None if tools is None else FORMATS[tools], tokenizer, ())
    answer = "".join(map(chr, tokenizer.encode_template(answer)))
    places = sorted({0, len(answer), *(cut % (len(answer) + 1) for cut in cuts)})
    places = sorted(
        {*places, *(i + n for i, c in enumerate(answer) for n in (0, 1) if c > "\ud800")}
    )
    new, names = AnswerText(), {token: name for name, token in tokenizer.control_tokens.items()}
    for piece in (answer[a:b] for a, b in pairwise(places)):
        name = names.get(ord(piece)) if len(piece) == 1 else None
        if name is None:
            new += parser.add(piece)
        elif ord(piece) in parser.marks:
            new += parser.mark(name)
    assert parser.opens_call or not parser.calls
    return new + parser.flush()


@pytest.mark.parametrize(
    ("tools", "thinking", "answer", "text", "calls"),
    [
        ("tags", None, f"<tool_call>\n{F}\n</tool_call>", "", [F_CALL]),
        ("tags", None, f"Let me see.\n\n<tool_call>{G}</tool_call>\n", "Let me see.", [G_CALL]),
        ("tags", None, f"<tool_call>\n{F}\n</tool_call>\n<tool_call>\n{G}\n</tool_call>", "",
         [F_CALL, G_CALL]),
        ("tags", TAGS, f"<think>\n<tool_call>{F}\n</think>\n\n<tool_call>{G}</tool_call>", "",
         [G_CALL]),
        ("tags", None, CUT, "", [("f", '{"a": ')]),
        ("tags", None, "a < b <tool_", "a < b <tool_", []),
        ("tags", None, "no <tool_call> here", "no <tool_call> here", []),
        ("tags", None, f"<tool_call>{'x' * 400}<tool_call>{F}",
         f"<tool_call>{'x' * 400}<tool_call>{F}", []),
        ("tags", None, '<tool_call>{"name": "', '<tool_call>{"name": "', []),
        ("tags", None, " a \n\n b ", " a \n\n b ", []),
        ("mistral", None, f"[TOOL_CALLS] [{F}, {G}]", "", [F_CALL, G_CALL]),
        ("mistral", None, f"So: [TOOL_CALLS][{G}]", "So:", [G_CALL]),
        ("mistral", None, f"{F}", F, []),
        ("mistral-args", None, f"So: [TOOL_CALLS]f[ARGS]{F_CALL[1]}[TOOL_CALLS]g.h-i[ARGS]{{}}",
         "So:", [F_CALL, G_CALL]),
        ("mistral-args", BRACKETS,
         "[THINK][TOOL_CALLS]f[ARGS]{}[/THINK]\n[TOOL_CALLS]g.h-i[ARGS]{}", "", [G_CALL]),
        ("mistral-args", None, "[TOOL_CALLS] f[ARGS] {", "", [("f", "{")]),
        ("mistral-ids", None, f"[TOOL_CALLS] f [CALL_ID]abcdefgh1[ARGS] {F_CALL[1]}", "", [F_CALL]),
        ("mistral-ids", None, "[TOOL_CALLS]f[ARGS]{}", "", [("f", "{}")]),
        ("mistral-ids", None, f"[TOOL_CALLS][{F}]", f"[TOOL_CALLS][{F}]", []),
        ("mistral-args", None, "[TOOL_CALLS]f", "[TOOL_CALLS]f", []),
        ("granite", None, f"<|tool_call|>[{F}]", "", [F_CALL]),
        ("granite-text", None, f"<tool_call>[{F}, {G}]", "", [F_CALL, G_CALL]),
        ("harmony", HARMONY, TO_G, "", [G_CALL]),
        ("harmony", HARMONY, ANALYSIS + TO_G.replace(" <|c", "<|c"), "", [G_CALL]),
        ("harmony", HARMONY, " to=functions.f<|channel|>commentary json<|message|>{}", "",
         [("f", "{}")]),
        ("harmony", HARMONY, f"{ANALYSIS}<|channel|>final<|message|>Hi", "Hi", []),
        ("qwen-coder", None, f"So:\n<tool_call>\n{QWEN}</tool_call>\n<tool_call>\n{QWEN_G}",
         "So:", [F_CALL, G_CALL]),
        ("qwen-coder", None, f"<tool_call>\n{QWEN[:60]}", "", [("f", '{"a": "}\\"{"')]),
        ("qwen-coder", None, "<tool_call>\nno", "<tool_call>\nno", []),
        ("glm", TAGS, f"<think>{GLM}</think>{GLM}\n<tool_call>g.h-i\n</tool_call>", "",
         [F_CALL, G_CALL]),
        ("glm-inline", TAGS, f"<think>{GLM_INLINE}</think>{GLM_INLINE}<tool_call>g.h-i</tool_call>",
         "", [F_CALL, G_CALL]),
        ("gemma", CHANNEL, f"So: {GEMMA}{GEMMA_G}", "So:", [F_CALL, G_CALL]),
        ("gemma", CHANNEL, f"<|channel>thought\n{GEMMA}\n<channel|>{GEMMA_G}", "", [G_CALL]),
        ("gemma", CHANNEL, "<|tool_call>hm", "<|tool_call>hm", []),
        ("gemma", None, GEMMA[:-13], "", [("f", '{"a": "}\\"{"')]),
        ("lfm", None, LFM, "", [F_CALL, G_CALL]),
        ("lfm", TAGS, f"<think>{LFM}</think>So:\n{LFM} [f(a=1)]", "So:", [F_CALL, G_CALL]),
        ("lfm", None, "<|tool_call_start|>[f( ", "", [("f", "")]),
        ("lfm", None, f"So: <|tool_call_start|>[{F}, {G}]<|tool_call_end|>", "So:",
         [F_CALL, G_CALL]),
        ("lfm", None, f"<|tool_call_start|>{G}<|tool_call_end|> f()", "", [G_CALL]),
        ("lfm", None, f"<|tool_call_start|>[{F[:-2]}", "", [("f", F_CALL[1][:-1])]),
        (None, HARMONY, TO_G, "", []),
        (None, None, f"<tool_call>{F}</tool_call>", f"<tool_call>{F}</tool_call>", []),
    ],
)  # fmt: skip
@settings(max_examples=30)
@given(cuts=st.lists(st.integers(0, 200), max_size=60))
def test_calls_are_found_in_any_pieces(tools, thinking, answer, text, calls, cuts):
    found = parsed(tools, thinking, answer, cuts)
    assert [(call.name, call.arguments) for call in joined_calls(found.calls)] == calls
    assert found.text == text
    assert all(len(call.id) == 9 and call.id.isalnum() for call in joined_calls(found.calls))


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("True", True), ("None", None), ("-1.5e3", -1500.0), ("'it\\'s'", "it's"),
        ('"a\\n\\u00fc\\\\"', "a\nü\\"), ("'it's, or \"x\"'", "it's, or \"x\""), ("''", ""),
        ("{'a': (1, False)}", {"a": [1, False]}), ("'a\nb'", "a\nb"), ("a b", "a b"),
    ],
)  # fmt: skip
def test_an_argument_may_be_any_python_literal(written, value):
    for answer in (f"f(a={written})", f"f(b=0, a={written}, c=0)"):
        found = parsed("lfm", None, f"<|tool_call_start|>[{answer}]<|tool_call_end|>", [])
        (call,) = joined_calls(found.calls)
        assert json.loads(call.arguments)["a"] == value


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("true", True), ("None", None), ("null", None), ("-2", -2), ("Q\\nQ", "\\n"), ("QQ", ""),
        ("Q{a,[Q", "{a,["), ("{a-b:[Q,Q,{}],c:{d:false}}", {"a-b": [",", {}], "c": {"d": False}}),
        ("hello", "hello"),
    ],
)  # fmt: skip
def test_an_argument_may_be_any_literal_of_gemma(written, value):
    written = written.replace("Q", '<|"|>')
    answer = f"<|tool_call>call:f{{b:0,a:{written},c:1}}<tool_call|>"
    (call,) = joined_calls(parsed("gemma", None, answer, []).calls)
    assert json.loads(call.arguments) == {"b": 0, "a": value, "c": 1}
    assert literal_of(value, GEMMA_QUOTE) in (
        written,
        written.replace("None", "null"),
        '<|"|>hello<|"|>',
    )


@pytest.mark.parametrize("name", ["gemma", "lfm", "mistral-args", "mistral-ids"])
@given(value=st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text("ab'\"\\\n,()[]{}ü: ", max_size=6),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["a", "b-c", "d1"]), inner, max_size=3),
    max_leaves=6,
))  # fmt: skip
@settings(max_examples=60)
def test_written_calls_are_read_again(name, value):
    format, call = FORMATS[name], ToolCall("abcdefgh1", "f", json.dumps({"a": value, "b": [value]}))
    answer = format.opening + format.text_of([call, call])
    (first, second) = joined_calls(parsed(name, None, answer, []).calls)
    assert (first.id == call.id) == (name == "mistral-ids")
    assert json.loads(first.arguments) == json.loads(second.arguments) == json.loads(call.arguments)


@pytest.mark.parametrize(
    ("tools", "answer"),
    [
        ("lfm", '<|tool_call_start|>[f(a={"x": 7E999, "y": NAN})]<|tool_call_end|>'),
        ("qwen-coder", "<tool_call>\n<function=f>\n<parameter=a>\n{}\n</parameter>\n</function>"),
    ],
)
def test_a_number_larger_than_pythons_stays_a_number(tools, answer):
    """The schemas allow it, and the object with it became a string."""
    for text, is_object in (('{"x": 7E999}', True), ('{"x": NaN}', False)):
        written = answer.replace('{"x": 7E999, "y": NAN}', text).replace("{}", text)
        (call,) = joined_calls(parsed(tools, None, written, []).calls)
        assert call.arguments == '{"a": ' + (text if is_object else json.dumps(text)) + "}"


def test_thinking_stays_apart_from_calls():
    found = parsed("tags", TAGS, f"<think>Hm.</think>\n\nSo:\n<tool_call>{F}</tool_call>", [])
    assert (found.thinking, found.text, len(joined_calls(found.calls))) == ("Hm.", "So:", 1)
    found = parsed("harmony", HARMONY, ANALYSIS + TO_G, [])
    assert (found.thinking, found.text, len(joined_calls(found.calls))) == ("Hm.", "", 1)


def test_arguments_come_as_they_are_generated():
    tokenizer: Any = MarkedCharacters(MARKS)
    parser = answer_parser(None, FORMATS["tags"], tokenizer, ())
    for piece, arguments in ((CUT, '{"a": '), ('"x', '"x'), ("y", "y"), ('"}}', '"}')):
        assert "".join(call.arguments for call in parser.add(piece).calls) == arguments


def test_a_long_text_between_tags_costs_each_token_little(monkeypatch):
    """Each token looked for the end of a name at each line of HTML, in cubic time."""
    matched = []
    tools: Any = MarkedCharacters(MARKS)
    parser: Any = answer_parser(None, FORMATS["qwen-coder"], tools, ())
    pattern = parser._argument
    watched = SimpleNamespace(match=lambda held: matched.append(held) or pattern.match(held))
    monkeypatch.setattr(parser, "_argument", watched)
    text = "<p>\n" * 300
    new = AnswerText()
    for piece in re.findall("(?s).{1,4}", f"<tool_call>\n{QWEN}".replace('}"{', text)):
        new += parser.add(piece)
    assert json.loads(joined_calls(new.calls)[0].arguments)["a"] == text
    assert len(matched) < 10
