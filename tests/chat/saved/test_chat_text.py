"""Exports: a person can tell who said what, a program gets it exactly."""

import json
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from mixchat.chat.saved.chat_text import to_json, to_markdown
from mixchat.chat.saved.saved_chat import SavedChat
from mixchat.text.messages import Message

BEGAN = datetime(2026, 11, 25, 16, 30, tzinfo=UTC)
CODE = "Like this:\n\n```python\nprint('# no heading')\n\n# none\n```\n\nDone."
CHAT = SavedChat(
    id="20261125-1630-k3f",
    name=None,
    model="instruct",
    identity="c0ffee",
    created=BEGAN,
    updated=BEGAN,
    system="Be brief.",
    sampling={"temperature": 0.7, "seed": None},
    messages=(
        Message("user", "How do I print in Python?"),
        Message("assistant", CODE, (1, 2)),
        Message("user", "Go on"),
        Message("assistant", "Wave", partial=True),
    ),
)


def saying(question, answer="Yes.", **other):
    return replace(
        CHAT, messages=(Message("user", question), Message("assistant", answer)), **other
    )


def headings(markdown):
    """The headings that are not inside of anything."""
    tokens = MarkdownIt("commonmark").parse(markdown)
    return [
        tokens[i + 1].content
        for i, token in enumerate(tokens)
        if token.type == "heading_open" and token.level == 0
    ]


def test_markdown_says_what_it_is_and_who_said_what():
    assert to_markdown(CHAT) == (
        "# How do I print in Python?\n\n"
        "- Model: instruct\n"
        f"- Started: {BEGAN.astimezone():%Y-%m-%d %H:%M}\n"
        "- ID: 20261125-1630-k3f\n\n"
        "## System prompt\n\n> Be brief.\n\n"
        "## You\n\n> How do I print in Python?\n\n"
        f"## Answer\n\n{CODE}\n\n"
        "## You\n\n> Go on\n\n"
        "## Answer\n\nWave\n\n*(unfinished)*\n"
    )


def test_the_title_is_the_name_if_there_is_one():
    assert to_markdown(replace(CHAT, name="My *best* chat")).startswith("# My \\*best\\* chat\n")
    assert to_markdown(replace(CHAT, messages=())).startswith("# A chat\n")


def test_a_long_first_question_is_shortened_in_the_title():
    title = to_markdown(saying("word\n" * 999)).splitlines()[0]
    assert title.startswith("# word word")
    assert title.endswith("...")
    assert len(title) < 90


@pytest.mark.parametrize(
    "question", ["# A\n\n## Answer\n\nfake", "a\r## Answer", "```\n# x", "<!--"]
)
def test_nothing_in_a_question_passes_for_a_heading_of_ours(question):
    assert headings(to_markdown(saying(question, name="x"))) == [
        "x",
        "System prompt",
        "You",
        "Answer",
    ]


@pytest.mark.parametrize(
    "answer",
    [
        *("```\nx = 1", "~~~~\n```\n~~~", "<!-- x", "<pre>\n\nx", "1. a\n   ```\n   b"),
        "- x\n\n  ```py",
    ],
)
def test_an_answer_that_was_stopped_within_code_swallows_nothing(answer):
    chat = replace(CHAT, messages=(Message("assistant", answer, partial=True), *CHAT.messages))
    markdown = to_markdown(chat)
    assert headings(markdown)[2:] == ["Answer", "You", "Answer", "You", "Answer"]
    assert markdown.count("\n\n*(unfinished)*\n") == 2
    assert all(line in markdown for line in answer.splitlines())


# Whatever is said, the turns can be told apart.
@example("```", "<script>")
@given(*[st.text(st.sampled_from("`~<>!-#= \n\ta1.[]:/?&;\\*script"), max_size=40)] * 2)
@settings(max_examples=200)
def test_the_last_turn_is_always_a_turn(question, answer):
    messages = (*saying(question, answer).messages, Message("user", "end"))
    markdown = to_markdown(replace(CHAT, messages=messages, name=None, system=answer))
    found = headings(markdown)
    assert found[-1] == "You"
    assert found.count("System prompt") == 1


def test_json_has_the_messages_as_openai_has_them():
    assert json.loads(to_json(CHAT)) == {
        "id": "20261125-1630-k3f",
        "name": None,
        "model": "instruct",
        "created": "2026-11-25T16:30:00+00:00",
        "updated": "2026-11-25T16:30:00+00:00",
        "system": "Be brief.",
        "sampling": {"temperature": 0.7, "seed": None},
        "messages": [
            {"role": "user", "content": "How do I print in Python?"},
            {"role": "assistant", "content": CODE},
            {"role": "user", "content": "Go on"},
            {"role": "assistant", "content": "Wave", "partial": True},
        ],
    }


@pytest.mark.parametrize("export", [to_json, to_markdown])
def test_an_export_is_utf8_whatever_was_said(export):
    text = export(saying("天気 😀 \ud83d end", "\ud83d\ude00"))
    assert "天気 😀 \ufffd end" in text.encode().decode()


THOUGHT = Message("assistant", "Yes.", (1, 2, 3), False, "Hm.\n# So", 2)


def test_markdown_has_the_thinking_before_its_answer():
    text = to_markdown(replace(CHAT, messages=(Message("user", "Hi"), THOUGHT)))
    assert text.endswith("## Thinking\n\n> Hm.\n> # So\n\n## Answer\n\nYes.\n")


def test_json_has_the_thinking_as_the_api_names_it():
    found = json.loads(to_json(replace(CHAT, messages=(Message("user", "Hi"), THOUGHT))))
    assert found["messages"] == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm.\n# So"},
    ]
