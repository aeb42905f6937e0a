"""Thinking is shown apart, counted, and left out of what the model is sent back."""

from typing import Any

import pytest
from chat_doubles import MARKS, STOP, CharacterTokenizer, what_was_asked
from fed_answers import answer_read_by, feed

from mixchat.face.events import End, Piece
from mixchat.text.detokenizer import TokenBytes
from mixchat.text.messages import Message
from mixchat.text.thinking import ThinkingFormat, parser_of

TAGS = ThinkingFormat("tags", ("enable_thinking",))
HARMONY = ThinkingFormat("harmony", ("reasoning_effort",))
TO_FINAL = "<|channel|>final<|message|>"
FINAL = f"<|start|>assistant{TO_FINAL}"
THOUGHTS = [
    (TAGS, "<think>\nHm.\n</think>\n\n"),
    (HARMONY, f"<|channel|>analysis<|message|>Hm.<|end|>{FINAL}"),
]


def spelled(text: str) -> str:
    for name, token in MARKS.items():
        text = text.replace(name, chr(token))
    return text


def listen(events: Any) -> tuple[str, str, End]:
    thinking = text = ""
    for event in events:
        if isinstance(event, Piece):
            assert not (text and event.thinking)
            thinking += event.thinking
            text += event.text
        elif isinstance(event, End):
            return thinking, text, event
    raise AssertionError("no End event")


def prompt_of(session: Any, turn: int) -> str:
    return "".join(map(chr, session.engine.prompts[turn]))


@pytest.mark.parametrize(("form", "thought"), THOUGHTS)
def test_thinking_comes_apart_and_is_in_no_later_prompt(session_of, form, thought):
    session = session_of(spelled(thought + "Yes"), "Fine", thinking=form)
    thinking, text, finished = listen(session.ask("Hi"))
    assert (thinking, text, finished.is_thinking) == ("Hm.", "Yes", False)
    tokens = len(spelled(thought))
    (_, answer) = session.history
    assert answer == Message(
        "assistant", "Yes", tuple(map(ord, spelled(thought + "Yes"))), False, "Hm.", tokens
    )
    assert finished.stats.generated_tokens == tokens + 4
    listen(session.ask("So?"))
    assert prompt_of(session, 1) == "[user]Hi[assistant]Yes[user]So?"
    assert session.used_tokens == len("[user]Hi[assistant]Yes[user]So?") + len("Fine")


def test_the_events_count_the_tokens_so_far(session_of):
    session = session_of("<think>ab</think>c", thinking=TAGS)
    events = [event for event in session.ask("Hi") if isinstance(event, Piece)]
    seen = [(event.thinking, event.thinking_tokens) for event in events if not event.text]
    assert seen[:2] == [("a", 8), ("b", 9)]
    assert seen[-1] == ("", session.history[-1].thinking_tokens)


@pytest.mark.parametrize(("form", "thought"), THOUGHTS)
def test_a_stop_string_does_not_count_in_thinking(session_of, form, thought):
    thought = thought.replace("Hm", "END")
    session = session_of(spelled(thought + "YesEND"), thinking=form, stop=["END", "analysis"])
    thinking, text, finished = listen(session.ask("Hi"))
    assert (thinking, text, finished.reason) == ("END.", "Yes", "stop_string")
    assert session.history[-1].content_ids == tuple(map(ord, "Yes"))


@pytest.mark.parametrize(("form", "thought"), THOUGHTS)
def test_an_answer_cut_off_anywhere_is_continued_as_if_it_had_not_been(session_of, form, thought):
    whole = spelled(thought + "Yes")
    for cut in range(len("<think>"), len(whole)):  # a tag is one token of a real model
        session = session_of(whole[:cut] + "?", whole[cut:], thinking=form, max_tokens=cut)
        first = listen(session.ask("Hi"))
        assert first[2].reason == "length"
        assert first[2].is_thinking == (first[0] != "" and first[1] == "")
        session.max_tokens = None
        rest = listen(session.continue_answer())
        assert prompt_of(session, 1) == "[user]Hi" + whole[:cut]
        assert (first[0] + rest[0], first[1] + rest[1]) == ("Hm.", "Yes")
        answer = session.history[-1]
        assert (answer.thinking, answer.content, answer.partial) == ("Hm.", "Yes", False)
        assert answer.content_ids == tuple(map(ord, "Yes"))
        assert answer.thinking_tokens == len(spelled(thought))


def test_a_full_context_within_thinking_is_said(session_of):
    session = session_of("<think>Hmmmmm", thinking=TAGS, context_size=17, max_tokens=0)
    _, text, finished = listen(session.ask("Hi"))
    assert (text, finished.reason, finished.is_thinking) == ("", "context", True)
    assert session.history[-1].partial


def test_an_interrupted_thinking_can_be_continued(session_of):
    session = session_of([*"<think>Hm", KeyboardInterrupt()], "</think>Yes", thinking=TAGS)
    assert listen(session.ask("Hi"))[2].reason == "interrupted"
    assert listen(session.continue_answer())[1] == "Yes"
    assert session.history[-1].content == "Yes"


@pytest.mark.parametrize(
    ("form", "think", "variables"),
    [
        (TAGS, "off", {"enable_thinking": False}),
        (TAGS, "on", {"enable_thinking": True}),
        (TAGS, "hide", {}),
        (TAGS, "show", {}),
        (HARMONY, "off", {}),
        (HARMONY, "on", {}),
        (None, "off", {}),
    ],
)
def test_on_and_off_use_the_switch_of_the_template(session_of, form, think, variables):
    session = session_of("Yes", thinking=form, think=think)
    listen(session.ask("Hi"))
    assert session.model.template.variables[-1] == variables


@pytest.mark.parametrize(
    ("form", "prefix", "path"),
    [(TAGS, "<think>\n", "</think>\n\n"), (TAGS, "", ""), (HARMONY, "", TO_FINAL)],
)
def test_an_answer_of_a_given_form_begins_at_once(session_of, form, prefix, path):
    session = session_of("{}", thinking=form, prefix=prefix, form=what_was_asked)
    assert listen(session.ask("Hi"))[:2] == ("", "{}")
    assert prompt_of(session, 0) == spelled(f"[user]Hi{prefix}{path}")
    assert session.engine.requests[0].constraint.asked[:2] == ([], False)


def test_an_answer_without_its_thinkings_ids_is_continued_past_the_thinking(session_of):
    """It may be another model's, whose ids mean nothing here."""
    session = session_of(" do", thinking=TAGS, prefix="<think>\n")
    session.restore([Message("user", "Hi"), Message("assistant", "I", None, True, "Hm", 9)])
    assert listen(session.continue_answer())[:2] == ("", " do")
    assert prompt_of(session, 0) == "[user]Hi<think>\n</think>\n\nI"
    assert session.history[-1] == Message("assistant", "I do", None, False, "Hm", 9)


def test_another_final_message_is_not_taken(session_of):
    session = session_of(spelled(f"{FINAL}One<|end|>{FINAL}Two"), thinking=HARMONY)
    assert listen(session.ask("Hi"))[1] == "One"


class Pairs(CharacterTokenizer):
    """A token is two characters."""

    token_bytes = TokenBytes(
        [
            f"{chr(token >> 8)}{chr(token & 255)}".replace("\0", "").encode()
            for token in range(1 << 16)
        ],
        {},
    )


@pytest.mark.parametrize(
    ("text", "content_ids"),
    [("<think>a</think>b!", 1), ("<think></think>b!", None), ("<think>ab</think>b ", None)],
)
def test_a_token_that_has_thinking_and_answer_is_not_remembered(text, content_ids):
    tokens = [ord(a) << 8 | ord(b) for a, b in zip(text[::2], text[1::2], strict=False)]
    tokenizer: Any = Pairs()
    parser = parser_of(TAGS, tokenizer, ())
    answer = answer_read_by(parser, tokenizer, {STOP})
    for token in (*tokens, STOP):
        feed(answer, token)
    message = answer.message()
    assert message is not None
    found = message.content_ids
    assert (None if found is None else len(found)) == content_ids
