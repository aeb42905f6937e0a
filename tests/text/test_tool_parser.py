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

from mixchat.text.thinking import AnswerText, ThinkingFormat
from mixchat.text.tool_call import joined_calls
from mixchat.text.tool_formats import FORMATS
from mixchat.text.tool_parser import answer_parser

NAMES = ("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|constrain|>", "[TOOL_CALLS]")
MARKS = {name: 0xE000 + number for number, name in enumerate(NAMES)}
TAGS, HARMONY = ThinkingFormat("tags"), ThinkingFormat("harmony")
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
CUT = '<tool_call>\n{"name": "f", "arguments": {"a": '


class Characters:
    """A token is a character."""

    control_tokens = MARKS

    def decode(self, ids: Any) -> str:
        return "".join(chr(token) for token in ids if token not in MARKS.values())


def parsed(tools: str | None, thinking: Any, answer: str, cuts: list[int]) -> AnswerText:
    """An answer whose text is cut at these places, and around each mark that counts."""
    tokenizer: Any = Characters()
    parser = answer_parser(thinking, None if tools is None else FORMATS[tools], tokenizer, ())
    for name, token in MARKS.items():
        answer = answer.replace(name, chr(token))
    places = sorted({0, len(answer), *(cut % (len(answer) + 1) for cut in cuts)})
    places = sorted(
        {*places, *(i + n for i, c in enumerate(answer) for n in (0, 1) if c > "\ud800")}
    )
    new, names = AnswerText(), {token: name for name, token in MARKS.items()}
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
        (None, HARMONY, TO_G, "", []),
        (None, None, f"<tool_call>{F}</tool_call>", f"<tool_call>{F}</tool_call>", []),
    ],
)  # fmt: skip
@settings(max_examples=30)
@given(cuts=st.lists(st.integers(0, 200), max_size=60))
def test_calls_are_found_in_any_pieces(
    tools: str, thinking: Any, answer: str, text: str, calls: Any, cuts: list[int]
) -> None:
    found = parsed(tools, thinking, answer, cuts)
    assert [(call.name, call.arguments) for call in joined_calls(found.calls)] == calls
    assert found.text == text
    assert all(len(call.id) == 9 and call.id.isalnum() for call in joined_calls(found.calls))


def test_thinking_stays_apart_from_calls() -> None:
    found = parsed("tags", TAGS, f"<think>Hm.</think>\n\nSo:\n<tool_call>{F}</tool_call>", [])
    assert (found.thinking, found.text, len(joined_calls(found.calls))) == ("Hm.", "So:", 1)
    found = parsed("harmony", HARMONY, ANALYSIS + TO_G, [])
    assert (found.thinking, found.text, len(joined_calls(found.calls))) == ("Hm.", "", 1)


def test_arguments_come_as_they_are_generated() -> None:
    tokenizer: Any = Characters()
    parser = answer_parser(None, FORMATS["tags"], tokenizer, ())
    for piece, arguments in ((CUT, '{"a": '), ('"x', '"x'), ("y", "y"), ('"}}', '"}')):
        assert "".join(call.arguments for call in parser.add(piece).calls) == arguments


def test_a_long_text_between_tags_costs_each_token_little(monkeypatch):
    """Each token looked for the end of a name at each line of HTML, in cubic time."""
    matched = []
    tools: Any = Characters()
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
