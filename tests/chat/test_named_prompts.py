"""Prompts that are kept by name: found, filled, bounded, and never outside their directory."""

import os

import pytest

from mixchat.base.context import Context
from mixchat.base.errors import PromptError, UsageError
from mixchat.chat.named_prompts import NamedPrompt, prompt_names, prompts_dir, read_named_prompt

CONTEXT = Context(100, 100)  # 12,800 bytes


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MIXCHAT_CONFIG", str(tmp_path / "config.toml"))
    folder = tmp_path / "prompts"
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("text", "words", "filled"),
    [
        ("Review:\n\n{{input}}\n\nBe brief.", "x = 1", "Review:\n\nx = 1\n\nBe brief."),
        ("{{ input }} {{input}}", "{{input}} \\1", "{{input}} \\1 {{input}} \\1"),
        ("Review this.", "x = 1", "Review this.\n\nx = 1"),
        ("Tell a joke.", "", "Tell a joke."),
    ],
)
def test_the_input_takes_its_place_or_follows_the_text(text, words, filled):
    assert NamedPrompt("p", text).filled(words, CONTEXT) == filled


def test_a_prompt_with_a_place_needs_an_input():
    with pytest.raises(PromptError, match="the prompt p needs an input"):
        NamedPrompt("p", "Review {{input}}").filled(" \n", CONTEXT)


def test_many_places_for_a_long_input_are_refused_before_they_are_filled():
    with pytest.raises(PromptError, match="the prompt p with its input"):
        NamedPrompt("p", "{{input}}" * 100).filled("x" * 1000, CONTEXT)


def test_a_prompt_is_read_without_the_newline_at_its_end(folder):
    (folder / "review.md").write_text("Review {{input}}\n")
    (folder / "no prompt.md").write_text("a name with a blank")
    (folder / "notes.txt").write_text("another file")
    assert read_named_prompt("review") == NamedPrompt("review", "Review {{input}}")
    assert prompt_names() == ["review"]


def test_a_wrong_name_gets_the_nearest_one(folder):
    (folder / "review.md").write_text("x")
    (folder / "zebra.md").write_text("x")
    for name, hint in (("reviw", "Did you mean review?"), ("q", "The prompts: review, zebra.")):
        with pytest.raises(UsageError, match="there is no prompt") as raised:
            read_named_prompt(name)
        assert raised.value.hint == hint


def test_without_prompts_the_hint_says_where_to_write_one():
    with pytest.raises(UsageError) as raised:
        read_named_prompt("review")
    assert str(prompts_dir() / "NAME.md, with {{input}} for what it gets.") in raised.value.hint


@pytest.mark.parametrize(
    "name", ["../secret", "a/b", ".hidden", "", "/etc/passwd", "a\0", "x" * 99]
)
def test_no_name_leads_out_of_the_directory(folder, name):
    (folder.parent / "secret.md").write_text("secret")
    with pytest.raises(UsageError, match="there is no prompt"):
        read_named_prompt(name)


@pytest.mark.parametrize(
    ("data", "fault"),
    [(b"", "is empty"), (b"\xff", "is not UTF-8"), (b"x" * 1_000_001, "larger than 1 MB")],
)
def test_a_file_that_is_no_prompt_is_one_line(folder, data, fault):
    (folder / "bad.md").write_bytes(data)
    with pytest.raises(PromptError, match=fault):
        read_named_prompt("bad")


def test_a_fifo_is_not_waited_for(folder):
    os.mkfifo(folder / "pipe.md")
    with pytest.raises(PromptError, match="cannot be read"):
        read_named_prompt("pipe")
