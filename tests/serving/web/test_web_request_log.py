"""`serve --log-requests`: a line for each request, also for one that is refused or broken off."""

import os
import re

import pytest
from chat_requests import CHAT, HI
from patience import wait_until
from raw_http import exchange, request

from mixchat.serving.web.access import Access
from mixchat.serving.web.request_log import written_aside

STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"


def lines_of(served, count=1):
    """The log as soon as it has so many lines, because a line comes after its response."""
    wait_until(lambda: len(served.log) >= count)
    return served.log


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_has_its_status_tokens_and_seconds_and_no_text(served, stream):
    exchange(served, request(CHAT, HI | {"stream": stream, "n": 2}, connection="close"))
    (line,) = lines_of(served)
    match = re.fullmatch(rf"{STAMP} POST {CHAT} 200 (\d+)\+(\d+) tokens \d+\.\d\d s", line)
    assert int(match[1]) == 2 * len(served.requests[0].ids)
    assert int(match[2]) > 0


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (request("/no/such?key=secret"), "GET /no/such 404"),
        (request(CHAT, {"messages": 1}), f"POST {CHAT} 400"),
        (request(CHAT, HI, host="evil.example"), f"POST {CHAT} 403"),
        (request("/v1/models"), "GET /v1/models 401"),
        (request(f"/{'x' * 500}"), f"GET /{'x' * 79}... 401"),
        (request("/a%0A%1b[2J"), "GET /a%0A%1b[2J 404"),
        (request("/", method="M" * 300), f"{'M' * 16}... / 405"),
    ],
)
def test_a_refused_request_is_logged_and_its_path_is_bounded_ascii(serve, data, words):
    served = serve(Access(key="k") if b"xxx" in data or b"v1/models" in data else None)
    exchange(served, data)
    (line,) = lines_of(served)
    assert re.fullmatch(rf"{STAMP} {re.escape(words)} \d+\.\d\d s", line)


def test_what_is_no_request_is_logged_with_its_refusal(served):
    exchange(served, b"\x16\x03\x01 TLS\r\n\r\n")
    (line,) = lines_of(served)
    assert re.fullmatch(rf"{STAMP} - - 400 \(no request\)", line)


def test_a_body_that_is_refused_on_its_way_is_one_line_with_that_status(served):
    head = request(CHAT, b"", content_length=None, transfer_encoding="chunked")
    exchange(served, head + b"1\r\n{\r\n" * 10_001)
    (line,) = lines_of(served)
    assert f"POST {CHAT} 413 " in line


def test_an_answer_whose_client_leaves_is_broken_off_with_the_tokens_so_far(served):
    body = {"messages": [{"role": "user", "content": "say:ab{hang}"}], "stream": True}
    with served.connect() as connection:
        connection.sendall(request(CHAT, body))
        connection.recv(1000)
    (line,) = lines_of(served)
    assert re.search(r" 200 \d+\+\d+ tokens \d+\.\d\d s \(broken off\)$", line)


def test_a_reader_that_stops_holds_nobody_and_the_lost_lines_are_counted():
    """Lines were written by the event loop: a full pipe stopped all answers."""
    reading, writing = os.pipe()
    with (
        open(reading) as reader,
        open(writing, "wb", 0) as pipe,
        written_aside(pipe.fileno()) as log,
    ):
        for number in range(20_000):
            log(f"line {number:060}")
        written = dropped = 0
        while written + dropped < 20_000:
            lost = re.fullmatch(rf"{STAMP} \((\d+) lines dropped\)\n", reader.readline())
            dropped += int(lost[1]) if lost else 0
            written += lost is None
    assert dropped > 10_000


def test_the_last_lines_are_written_at_the_end():
    reading, writing = os.pipe()
    with open(reading) as reader:
        with open(writing, "wb", buffering=0), written_aside(writing) as log:
            log("one")
            log("two")
        assert reader.read() == "one\ntwo\n"
