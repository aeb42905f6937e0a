"""The bytes of tokens: joined, they are the text that a person sees."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_strategies import anything

from mixchat.text.detokenizer import Detokenizer, TokenBytes

many = settings(max_examples=40)
choices = st.lists(st.integers(0, 10**9), min_size=1, max_size=30)


def joined(tokens: TokenBytes, ids: list[int], *, begins: bool = True) -> bytes:
    """Return the bytes of ids, the first of which begins a text or follows another."""
    head, *rest = ids
    first = tokens.first.get(head, tokens.within[head]) if begins else tokens.within[head]
    return first + b"".join(tokens.within[i] for i in rest)


def shown(tokenizer: Any, ids: list[int], before: list[int]) -> str:
    detokenizer = Detokenizer(tokenizer.token_bytes, before)
    return "".join(map(detokenizer.add, ids)) + detokenizer.flush()


@pytest.fixture(scope="session")
def tokens(tokenizer: Any) -> TokenBytes:
    result: TokenBytes = tokenizer.token_bytes
    return result


def pick(tokens: TokenBytes, places: list[int]) -> list[int]:
    """Return tokens that have bytes, by places among them; one in two is part of a character."""
    with_text = [i for i, text in enumerate(tokens.within) if text]
    parts = [i for i in with_text if not is_text(tokens.within[i])] or with_text
    return [(parts if n % 2 else with_text)[n % len(parts if n % 2 else with_text)] for n in places]


def is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


@many
@given(places=choices)
def test_random_tokens_are_decoded_as_by_the_original(
    places, tokenizer, tokens, reference, v1_original
):
    ids = pick(tokens, places)
    data = joined(tokens, ids)
    if not is_text(data):  # the libraries write U+FFFD for a byte, a run or an incomplete character
        return
    original = (
        v1_original.decode(ids)
        if reference is None
        else reference.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )
    assert data.decode() == original == tokenizer.decode(ids) == shown(tokenizer, ids, [])


@many
@given(text=anything, places=choices)
def test_the_bytes_of_tokens_after_a_prompt_are_the_text_that_is_shown(
    text, places, tokenizer, tokens
):
    before, ids = tokenizer.encode("Once " + text), pick(tokens, places)
    data = joined(tokens, ids, begins=False)
    if is_text(data):
        assert data.decode() == shown(tokenizer, ids, before)


def test_every_token_has_an_entry_and_control_tokens_have_no_bytes(tokenizer, tokens):
    assert len(tokens.within) == tokenizer.vocab_size
    controls = tokenizer.control_tokens.values()
    assert [tokens.within[i] for i in controls] == [b""] * len(controls)
    assert not tokens.first.keys() & set(controls)
