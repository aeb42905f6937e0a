"""Streams of text: all of it in order, never half a character, and no part of a stop string."""

from collections.abc import Sequence
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from text_strategies import anything

from mixchat.text.detokenizer import Detokenizer, StopStrings

many = settings(max_examples=40)


def streamed(tokenizer: Any, ids: Sequence[int], prompt_ids: Sequence[int] = ()) -> list[str]:
    detokenizer = Detokenizer(tokenizer.token_bytes, prompt_ids)
    return [*(detokenizer.add(i) for i in ids), detokenizer.flush()]


@st.composite
def id_lists(draw: st.DrawFn, size: int) -> list[int]:
    """Any ids, more often the first ones: control tokens and bytes."""
    ids = st.integers(0, size + 3) | st.integers(0, 300) | st.integers(120, 258)
    runs = st.lists(ids, max_size=60) | st.builds(lambda i, n: [i] * n, ids, st.integers(1, 60))
    return [i for run in draw(st.lists(runs, max_size=3)) for i in run]


@many
@given(data=st.data())
def test_the_pieces_are_the_text(data, tokenizer):
    ids = data.draw(id_lists(tokenizer.vocab_size))
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@many
@given(text=anything, data=st.data())
def test_after_a_prompt_the_pieces_are_the_rest(text, data, tokenizer):
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    prompt = [*bos, *tokenizer.encode(text)]
    ids = data.draw(id_lists(tokenizer.vocab_size))
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *ids])
    assert whole.startswith(before)
    assert "".join(streamed(tokenizer, ids, prompt)) == whole[len(before) :]


@many
@given(text=anything.filter(lambda text: "\ufffd" not in text), cut=st.integers(0, 200))
def test_each_character_is_shown_when_it_is_complete(text, cut, tokenizer):
    ids = tokenizer.encode(text)
    if "\ufffd" in tokenizer.decode(ids):
        return
    shown = ""
    detokenizer = Detokenizer(tokenizer.token_bytes)
    for count, token_id in enumerate(ids, start=1):
        shown += detokenizer.add(token_id)
        assert "\ufffd" not in shown
        # All of the text, except the incomplete character.
        assert shown == tokenizer.decode(ids[:count]).rstrip("\ufffd")


def test_an_unfinished_character_is_replaced_at_the_end(v1):
    euro = [3 + byte for byte in "€".encode()]
    assert streamed(v1, euro) == ["", "", "€", ""]
    assert streamed(v1, euro[:2]) == ["", "", v1.decode(euro[:2])]
    assert streamed(v1, [*euro[:2], 22557]) == ["", "", "\ufffd Hello", ""]


abc = st.text("ab\n", max_size=12)


def test_a_word_keeps_its_space_after_many_control_tokens(v1):
    assert "".join(streamed(v1, [22557, *[1] * 100, 22557])) == "Hello Hello"
    assert "".join(streamed(v1, [22557], [*v1.encode("Say"), *[2] * 100])) == " Hello"


def test_flushing_twice_shows_nothing_twice(v1):
    detokenizer = Detokenizer(v1.token_bytes)
    detokenizer.add(3 + 0xE2)
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def reference(stops: list[str], text: str) -> tuple[str, bool]:
    """Return the text before the stop string that ends first, the longest one that ends there."""
    for end in range(1, len(text) + 1):
        found = [s for s in stops if s and text[:end].endswith(s)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@settings(max_examples=300)
@given(stops=st.lists(st.text("ab\n", max_size=4), max_size=3), chunks=st.lists(abc, max_size=6))
def test_only_what_may_begin_a_stop_string_is_held_back_and_cuts_make_no_difference(stops, chunks):
    stop = StopStrings(stops)
    came, out, stopped = "", "", False
    for chunk in chunks:
        piece, stopped = stop.add(chunk)
        came, out = came + chunk, out + piece
        if stopped:
            break
        held = came[len(out) :]
        assert came == out + held
        assert held == "" or any(s.startswith(held) and s != held for s in stops)
    assert (out + stop.flush(), stopped) == reference(stops, "".join(chunks))
