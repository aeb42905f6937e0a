"""Messages between chat side and worker: what is packed is unpacked, and nothing else is."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixchat import __version__
from mixchat.experts.cache import ExpertKey
from mixchat.experts.workers import messages
from mixchat.experts.workers.connection import BadMessageError
from mixchat.experts.workers.messages import Hello, Kind, Refusal, Request, Welcome

UNPACKERS: list[Callable[[bytes], object]] = [
    messages.unpack_hello,
    messages.unpack_welcome,
    messages.unpack_refusal,
    messages.unpack_keys,
    messages.unpack_request,
    messages.unpack_done,
    messages.unpack_text,
]

HELLO = Hello("ab" * 32, "tiny", "bfloat16", 64, True)
WELCOME = Welcome(24, "words")

untimed = settings(deadline=None)  # the machine may be busy
experts = st.dictionaries(st.integers(0, 2**16 - 1), st.integers(1, 200), min_size=1, max_size=9)


def payload(kind: Kind, value: Hello | Welcome | Refusal) -> bytes:
    return messages.expect(kind, messages.pack_fields(kind, value))


def test_both_ends_words_arrive() -> None:
    assert messages.unpack_hello(payload(Kind.HELLO, HELLO)) == HELLO
    assert HELLO.version == __version__
    assert messages.unpack_welcome(payload(Kind.WELCOME, WELCOME)) == WELCOME
    refusal = Refusal("busy", "is busy")
    assert messages.unpack_refusal(payload(Kind.REFUSAL, refusal)) == refusal


@untimed
@given(st.integers(0, 2**16 - 1), experts)
def test_a_request_arrives(layer: int, rows: dict[int, int]) -> None:
    request = Request(layer, tuple(rows.items()))
    assert messages.unpack_request(messages.pack_request(request) + b"rows") == (request, b"rows")
    assert request.rows == request.rows_sent == sum(rows.values())


@untimed
@given(st.integers(0, 2**16 - 1), st.sets(st.integers(0, 2**16 - 1), min_size=1, max_size=9))
def test_a_request_with_one_row_for_all_arrives(layer: int, numbers: set[int]) -> None:
    request = Request(layer, tuple((number, 1) for number in numbers), True)
    assert messages.unpack_request(messages.pack_request(request) + b"row") == (request, b"row")
    assert (request.rows, request.rows_sent) == (len(numbers), 1)


@untimed
@given(st.sets(st.builds(ExpertKey, st.integers(0, 99), st.integers(0, 99)), max_size=300))
def test_keys_arrive_in_their_order(keys: set[ExpertKey]) -> None:
    listed = list(keys)
    assert messages.unpack_keys(messages.pack_keys(listed)[1:]) == listed


@untimed
@given(st.binary(max_size=200))
def test_no_bytes_raise_another_error(payload: bytes) -> None:
    for unpack in UNPACKERS:
        with suppress(BadMessageError):
            unpack(payload)


@untimed
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
        lambda value: st.lists(value) | st.dictionaries(st.sampled_from(list("ab")), value),
    ),
    st.sampled_from(["version", "dtype", "hidden_size", "exact_prompts"]),
)
def test_no_json_raises_another_error(value: object, name: str) -> None:
    fields = json.loads(payload(Kind.HELLO, HELLO))
    for odd in (value, {**fields, name: value}):
        with suppress(BadMessageError):
            messages.unpack_hello(json.dumps(odd).encode())


@pytest.mark.parametrize(
    "changes",
    [
        {"slots": 1},
        {"slots": 10**6},
        {"slots": 2.0},
    ],
    ids=str,
)
def test_a_welcome_that_makes_no_sense_is_refused(changes: dict[str, object]) -> None:
    fields = {**json.loads(payload(Kind.WELCOME, WELCOME)), **changes}
    with pytest.raises(BadMessageError):
        messages.unpack_welcome(json.dumps(fields).encode())


def test_the_other_end_s_text_is_safe_to_show() -> None:
    assert messages.unpack_text(b"\x1b[2Jno\nfile \xff" + b"x" * 500)[:14] == "[2Jno file \ufffdxx"
    assert len(messages.unpack_text(b"x" * 500)) == 200
    odd = Refusal("other", "\x1b]0;title\x07a\u202eb")
    assert messages.unpack_refusal(payload(Kind.REFUSAL, odd)).text == "]0;titleab"
