"""Messages between chat side and worker: what is packed is unpacked, and nothing else is."""

import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from worker_double import HELLO

from mixchat.experts.workers.messages import (
    MAX_EXPERTS,
    MAX_SLOTS,
    Compute,
    Computed,
    Ended,
    Hold,
    Refusal,
    Welcome,
    pack,
    unpack,
)
from mixchat.experts.workers.sockets import PIECE, BadMessageError

indices = st.integers(0, 2**16 - 1)
experts = st.dictionaries(indices, st.integers(1, 200), min_size=1, max_size=9)


@pytest.mark.parametrize(
    "message",
    [
        HELLO,
        Welcome(slots=24, arithmetic="words"),
        Refusal(cause="busy", text="is busy"),
        Hold(keys=((3, 1), (0, 7), (3, 0))),
        Computed(seconds=0.25),
        Ended(reason="the disk says no"),
    ],
    ids=lambda message: message.type,
)
def test_a_message_arrives(message):
    assert unpack(pack(message)) == (message, b"")


@given(indices, experts, st.binary(max_size=9))
def test_a_request_arrives_with_its_first_rows(layer, rows, piece):
    request = Compute(layer=layer, experts=tuple(rows.items()), shared_row=False)
    assert unpack(pack(request, piece)) == (request, piece)
    assert request.rows == request.rows_sent == sum(rows.values())
    shared = Compute(layer=layer, experts=tuple((key, 1) for key in rows), shared_row=True)
    assert unpack(pack(shared, piece)) == (shared, piece)
    assert (shared.rows, shared.rows_sent) == (len(rows), 1)


def test_the_longest_messages_are_not_too_long():
    """A socket takes `PIECE` bytes of rows, and 64 KiB before them."""
    every = tuple((2**16 - 1 - number, 1) for number in range(MAX_EXPERTS))
    assert len(pack(Compute(layer=2**16 - 1, experts=every, shared_row=True))) <= 1 << 16
    keys = tuple((2**16 - 1, number) for number in range(MAX_SLOTS))
    assert len(pack(Hold(keys=keys))) <= PIECE


@given(st.binary(max_size=200))
def test_no_bytes_raise_another_error(data):
    with suppress(BadMessageError):
        unpack(data)


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
        lambda value: st.lists(value) | st.dictionaries(st.sampled_from(list("ab")), value),
    ),
    st.sampled_from(["type", "version", "dtype", "hidden_size", "exact_prompts"]),
)
def test_no_json_raises_another_error(value, name):
    for odd in (value, {**json.loads(pack(HELLO)), name: value}):
        with suppress(BadMessageError):
            unpack(json.dumps(odd).encode())


@pytest.mark.parametrize("slots", [1, 10**6, 2.0, True, "2"])
def test_a_welcome_that_makes_no_sense_is_refused(slots):
    fields = {**json.loads(pack(Welcome(slots=24, arithmetic="words"))), "slots": slots}
    with pytest.raises(BadMessageError):
        unpack(json.dumps(fields).encode())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2Jno\nfile \udcff", "[2Jno file ?"),
        ("\x1b]0;title\x07a\u202eb", "]0;titleab"),
        ("x" * 500, "x" * 200),
    ],
)
def test_the_other_end_s_text_is_safe_to_show(text, shown):
    assert unpack(pack(Ended(reason=text)))[0] == Ended(reason=shown)
    sent = json.dumps({"type": "ended", "reason": text.replace("\udcff", "?")})
    assert unpack(sent.encode())[0] == Ended(reason=shown)
