"""Events are the same, wherever the network cuts them."""

from itertools import pairwise, repeat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixchat.base.errors import ServerError
from mixchat.serving.client.server_json import Comment, events

STREAM = (
    ": waiting\n\ndata: one\r\n\r\nevent: x\ndata: é€😀\ndata:second line\nid: 7\n\n:\n\n\n"
    "retry: 5\n\ndata\n\ndata: last"
).encode()
EVENTS = [
    Comment("waiting"),
    "one",
    "é€😀\nsecond line",
    Comment(""),
    "",
    "last",
]


@given(st.lists(st.integers(0, len(STREAM))))
def test_pieces_may_be_cut_anywhere(cuts):
    ends = [0, *sorted(cuts), len(STREAM)]
    pieces = [STREAM[a:b] for a, b in pairwise(ends)]
    assert list(events(pieces)) == EVENTS


def test_what_is_not_utf_8_is_replaced():
    assert list(events([b"data: a\xff\n\n"])) == ["a\ufffd"]


def test_an_event_comes_before_the_next_piece_is_read():
    def pieces():
        yield b"data: one\n\n"
        raise AssertionError("it was read too early")

    assert next(events(pieces())) == "one"


@pytest.mark.parametrize("line", [b"x" * 65536, b"data: " + b"x" * 65536 + b"\n"])
def test_an_event_without_an_end_does_not_fill_the_memory(line):
    with pytest.raises(ServerError, match="more than 1 MiB"):
        for _ in events(line for _ in range(10**6)):
            pass


def test_an_event_of_empty_lines_does_not_fill_the_memory_either():
    """Only the bytes of the data counted, so that lines without any were kept for ever."""
    with pytest.raises(ServerError, match="more than 1 MiB"):
        list(events(repeat(b"data:\n" * 10_000, 1000)))
