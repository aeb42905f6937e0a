"""Thinking is taken apart from the answer, however the text is cut into tokens."""

import re
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from marked_characters import MarkedCharacters

from mixchat.text.thinking import AnswerText, ThinkingFormat, format_of, parser_of

NAMES = ("channel", "message", "start", "end", "return", "call")
MARKS = (*(f"<|{name}|>" for name in NAMES), "<|channel>", "<channel|>", "[THINK]", "[/THINK]")
TOKENIZER: Any = MarkedCharacters(MARKS)
TAGS, HARMONY = ThinkingFormat("tags"), ThinkingFormat("harmony")
CHANNEL, BRACKETS = ThinkingFormat("channel"), ThinkingFormat("brackets")


def parsed(form: Any, pieces: Any, prompt: str = "", begun: str = "") -> tuple[str, str, Any]:
    """The thinking and the text of an answer in pieces, and the place at which the text starts."""
    encode = TOKENIZER.encode_template
    parser = parser_of(form, TOKENIZER, encode(prompt), encode(begun))
    new = AnswerText()
    for piece in pieces:
        mark = parser.marks.get(ord(piece)) if len(piece) == 1 else None
        new += parser.add(piece) if mark is None else parser.mark(mark)
    new += parser.flush()
    return new.thinking, new.text, parser.start


def spelled(text: str) -> list[str]:
    return list(map(chr, TOKENIZER.encode_template(text)))


FINAL = "<|start|>assistant<|channel|>final<|message|>"


@pytest.mark.parametrize(
    ("form", "prompt", "answer", "thinking", "text"),
    [
        (TAGS, "", "<think>\nHm.\n</think>\n\nYes", "Hm.", "Yes"),
        (TAGS, "<think>\n", "Hm.\n</think>\n\nYes", "Hm.", "Yes"),  # the prompt has opened it
        (TAGS, "<think>\n\n</think>\n\n", "Yes", "", "Yes"),
        (TAGS, "", "\n<think>\n\n</think>\n\nYes\n", "", "Yes\n"),
        (TAGS, "", " Yes, as in <think>x</think>", "", " Yes, as in <think>x</think>"),
        (TAGS, "", "<think>a</think>b</think><think>c", "a", "b</think><think>c"),
        (TAGS, "", "<think>a < b, </thin, <think>, </think >\n </think>c",
         "a < b, </thin, <think>, </think >", "c"),
        (TAGS, "", "<think>\n\na\n\nb\n\n", "a\n\nb", ""),  # cut off
        (TAGS, "<think>", "a</thi", "a", ""),
        (TAGS, "", "<thi", "", "<thi"),
        (TAGS, "", "  ", "", "  "),
        (TAGS, "", "", "", ""),
        (TAGS, "<think>\n", "", "", ""),
        (TAGS, "", "<think>🙂</think>🙂", "🙂", "🙂"),
        # The marks of channels have no text, and channels other than final are thinking.
        (CHANNEL, "", "<|channel>thought\nHm.\n<channel|>Yes", "Hm.", "Yes"),
        (CHANNEL, "", "<|channel>thought\n<channel|>Yes", "", "Yes"),
        (CHANNEL, "<|channel>thought\n", "Hm.<channel|>\nYes", "Hm.", "Yes"),
        (CHANNEL, "", "Yes <|channel>thought\n", "", "Yes thought\n"),
        (CHANNEL, "", "<|channel>final\nYes<channel|>", "", "final\nYes"),
        (CHANNEL, "", "<|channel>thought\nHm", "Hm", ""),
        (HARMONY, "", f"<|channel|>analysis<|message|>Hm.<|end|>{FINAL}Yes", "Hm.", "Yes"),
        (HARMONY, "", "<|channel|>final<|message|>Yes", "", "Yes"),
        (HARMONY, "", "<|message|>Yes", "", "Yes"),
        (HARMONY, "", "Yes", "", "Yes"),
        (HARMONY, "", "<|channel|>analysis<|message|>A<|end|><|start|>assistant<|channel|>"
         f"commentary to=f <|message|>B<|end|>{FINAL}C", "A\n\nB", "C"),
        (HARMONY, "", "<|channel|>analysis<|message|>Hm", "Hm", ""),
        (HARMONY, "", "<|channel|>analy", "", ""),
        (HARMONY, "", f"<|channel|>analysis<|message|><|end|>{FINAL}final", "", "final"),
    ],
)  # fmt: skip
@settings(max_examples=30)
@given(cuts=st.lists(st.integers(0, 60), max_size=60))
def test_thinking_is_found_in_any_pieces(form, prompt, answer, thinking, text, cuts):
    encoded = "".join(spelled(answer))
    marks = [i + n for i, char in enumerate(encoded) if char > "\ud800" for n in (0, 1)]
    places = sorted({0, len(encoded), *marks, *(cut % (len(encoded) + 1) for cut in cuts)})
    found, rest, start = parsed(form, [encoded[a:b] for a, b in pairwise(places)], prompt)
    assert (found, rest) == (thinking, text)
    if text and (thinking or form is not CHANNEL):
        assert start is not None
        assert encoded[start:] == text


@given(parts=st.lists(st.sampled_from(["<think>", "</think>", "<", "/", "think>", " ", "\n", "a"])))
def test_tags_are_found_as_in_the_whole_text(parts):
    answer = "".join(parts)
    thought = re.match(r"\s*<think>\s*(.*?)\s*(?:</think>\s*(.*)|)\Z", answer, re.S)
    expected = ("", answer)
    if thought is not None:
        # The beginning of a closing tag is none of the thinking if nothing follows.
        is_certain = "</think>" in answer or answer[-1].isspace()
        cut_off = thought[1] if is_certain else re.sub(r"\s*</?\Z", "", thought[1])
        expected = (cut_off, thought[2] or "")
    assert parsed(TAGS, parts)[:2] == expected
    assert parsed(TAGS, answer)[:2] == expected


@pytest.mark.parametrize(
    ("form", "whole"),
    [
        (TAGS, "<think>\na</b\n</think>\n\nYes, I do"),
        (HARMONY, f"<|channel|>analysis<|message|>Hm<|end|>{FINAL}Yes, I do"),
    ],
)
def test_an_answer_is_continued_from_any_place(form, whole):
    whole = "".join(spelled(whole))
    thinking, text, start = parsed(form, whole)
    assert start is not None
    for cut in range(1, len(whole)):
        before, after = whole[:cut], whole[cut:]
        encode = TOKENIZER.encode_template
        first = parser_of(form, TOKENIZER, ())
        shown = AnswerText()
        for piece in before:
            mark = first.marks.get(ord(piece))
            shown += first.add(piece) if mark is None else first.mark(mark)
        rest = parsed(form, after, begun=before)
        assert (shown.thinking + rest[0], shown.text + rest[1]) == (thinking, text)
        assert rest[2] == max(start - cut, 0)
        assert encode(before) == list(map(ord, before))


@pytest.mark.parametrize(
    ("form", "prompt", "path"),
    [
        (TAGS, "<|start|>assistant\n<think>\n", "</think>\n\n"),
        (TAGS, "assistant\n<think>\n\n</think>\n\n", ""),
        (TAGS, "assistant\n", ""),
        (CHANNEL, "<|channel>thought\n", "<channel|>"),
        (CHANNEL, "<|channel>thought\n<channel|>", ""),
        (BRACKETS, "[/INST][THINK]", "[/THINK]"),
        (BRACKETS, "[/INST]", ""),
        (HARMONY, "<|start|>assistant", "<|channel|>final<|message|>"),
    ],
)
def test_a_prompt_can_lead_past_the_thinking(form, prompt, path):
    ids = TOKENIZER.encode_template(prompt)
    found = form.to_answer(TOKENIZER, ids)
    assert found == TOKENIZER.encode_template(path)
    assert parsed(form, list("Yes"), prompt, path) == ("", "Yes", 0)


def test_a_template_has_the_format_that_its_source_names():
    known = ["enable_thinking", "messages", "reasoning_effort"]
    assert format_of("{{ '<think>' }}", known) == ThinkingFormat(
        "tags", ("enable_thinking", "reasoning_effort")
    )
    assert format_of("<|channel|>final<|message|>", []) == HARMONY
    assert format_of("<|im_start|>", known) is None
    assert format_of("'[THINK]' + block.thinking", known).kind == "brackets"
    assert format_of("<|channel>thought\n<channel|>", known).kind == "channel"
    assert ThinkingFormat("tags", ("thinking",)).switch == "thinking"
    assert HARMONY.switch is None
