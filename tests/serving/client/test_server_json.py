"""The JSON of a server is read if it has the form of mixchat's, else refused in one line."""

import json
from contextlib import suppress
from itertools import pairwise, repeat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixchat.base.errors import MixchatError, ModelNotFoundError, PromptTooLongError, ServerError
from mixchat.serving.client.server_json import (
    Chunk,
    Comment,
    ListedModel,
    Usage,
    error_of,
    events,
    parsed_error,
    read_chunk,
    read_models,
)
from mixchat.text.tool_call import CallDelta

LONG = PromptTooLongError
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["choices", "delta", "content", "usage", "error", "message", "code", "data", "id"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


def piece_of(**chunk):
    return read_chunk(json.dumps(chunk))


def test_a_piece_has_text_reason_and_usage():
    assert piece_of(choices=[{"delta": {"content": "Hi"}}]) == Chunk("Hi")
    assert piece_of(choices=[{"delta": {}, "finish_reason": "length"}]) == Chunk(reason="length")
    assert piece_of(choices=[{"delta": {"reasoning_content": "Hm"}}]) == Chunk(thinking="Hm")
    assert piece_of(choices=[{"delta": None, "finish_reason": "eos"}]) == Chunk(reason="stop")
    counts = {"prompt_tokens": 5, "completion_tokens": 2}
    assert piece_of(choices=[], usage=counts) == Chunk(usage=Usage(5, 0, 2))
    counts["prompt_tokens_details"] = {"cached_tokens": 3}
    assert piece_of(choices=None, usage=counts).usage == Usage(5, 3, 2)


def test_calls_of_tools_come_in_pieces():
    function = {"name": "find", "arguments": ""}
    first = {"tool_calls": [{"index": 0, "id": "1", "function": function}]}
    more = {"tool_calls": [{"index": 0, "function": {"arguments": '{"a": 1}'}}]}
    assert piece_of(choices=[{"delta": first}]) == Chunk(calls=(CallDelta(0, "", "1", "find"),))
    assert piece_of(choices=[{"delta": more}]) == Chunk(calls=(CallDelta(0, '{"a": 1}'),))
    end = piece_of(choices=[{"delta": {}, "finish_reason": "tool_calls"}])
    assert end == Chunk(reason="tool_calls")
    with pytest.raises(ServerError):
        piece_of(choices=[{"delta": {"tool_calls": [{"index": 10**9}]}}])


def test_half_a_character_is_replaced():
    assert read_chunk('{"choices": [{"delta": {"content": "a\\ud800b"}}]}').text == "a\ufffdb"


@pytest.mark.parametrize(
    "data",
    ["", "nonsense", "[]", "1", "null", "[" * 100_000, '{"choices": 3}', '{"choices": [3]}'],
)
def test_what_is_no_piece_is_refused(data):
    with pytest.raises(ServerError):
        read_chunk(data)


@pytest.mark.parametrize("error", [{"message": "broken"}, "broken", {"detail": "broken"}])
def test_an_error_in_the_stream_is_what_the_server_says(error):
    with pytest.raises(ServerError, match="the server says: broken"):
        piece_of(error=error)


@given(JSON)
def test_whatever_comes_is_read_or_refused(value):
    data = json.dumps(value)
    for read in (read_chunk, lambda text: read_models(text.encode())):
        with suppress(ServerError):
            read(data)
    assert isinstance(error_of(400, parsed_error(data.encode())), MixchatError)


def test_models_have_names_that_can_be_shown_and_the_size_that_mixchat_tells():
    listed = [
        {"id": "a", "context_size": 4096},
        {"id": "b", "context_size": "x"},
        {"id": "c\x1b[2J"},
        {"id": 3},
        {"id": ""},
        {"id": "d" * 300},
    ]
    body = json.dumps({"data": listed}).encode()
    assert read_models(body) == [ListedModel("a", 4096), ListedModel("b")]


@pytest.mark.parametrize(
    ("raw", "kind", "said"),
    [
        ({"error": {"message": "m", "code": "context_length_exceeded"}}, LONG, "m"),
        ({"error": {"message": "m", "code": "model_not_found"}}, ModelNotFoundError, "m"),
        ({"detail": "Not Found"}, ServerError, "Not Found"),
        ("", ServerError, "500, without a reason"),
        ({"error": "long " * 200}, ServerError, "…"),
    ],
)
def test_errors_of_the_server_become_ours(raw, kind, said):
    error = error_of(500, raw)
    assert type(error) is kind
    assert said in str(error)
    assert len(str(error)) < 300


def test_a_page_of_a_proxy_is_not_shown():
    assert parsed_error(b"<html>502</html>") == ""
    assert parsed_error(b"upstream is gone") == {"error": "upstream is gone"}


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
