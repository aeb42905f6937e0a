"""No byte of a model's text may act on the terminal."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixchat.base.sanitize import sanitize

BIDI_CONTROLS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


@pytest.mark.parametrize(
    "payload",
    [
        "\x1b[2J",
        "\x1b]0;title\x07",
        "\x9b31m",
        "\x9d52;c;aGk=\x9c",
        "back\x08\x08\x7f",
        "over\rwritten",
        "\x00\x1f\x80\x9f",
        "\u202egnp.exe",
        "\u2066isolated\u2069",
        "\u200e\u200f\u061c",
    ],
)
def test_control_characters_are_dropped(payload):
    clean = sanitize(payload)
    assert not [c for c in clean if ord(c) < 0x20 or 0x7F <= ord(c) < 0xA0]
    assert not [c for c in clean if unicodedata.bidirectional(c) in BIDI_CONTROLS]
    assert not set(clean) & set("\u061c\u200e\u200f")


@pytest.mark.parametrize(
    "text",
    [
        "a\tb\n",
        "[INST] [bold] [/]",
        "vector<T> <think>",
        "日本語 é \U0001f469\u200d\U0001f467",
        "שלום",
    ],
)
def test_ordinary_text_is_unchanged(text):
    assert sanitize(text) == text


@given(st.text(), st.integers(0, 50))
def test_it_does_not_matter_where_the_text_is_cut(text, at):
    assert sanitize(text[:at]) + sanitize(text[at:]) == sanitize(text)


@given(st.text(st.characters()))
def test_sanitized_text_can_be_encoded(text):
    assert sanitize(text).encode("utf-8").decode("utf-8") == sanitize(text)
