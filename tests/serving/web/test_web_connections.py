"""Connections whose client is slow, silent, or gone."""

import json
import socket
import time
from contextlib import suppress

import psutil
import pytest
from form_bombs import bomb
from patience import wait_until
from raw_http import exchange, read_response, request

from mixchat.experts.workers.address import resolve
from mixchat.serving.web import answers
from mixchat.serving.web.access import bind
from mixchat.serving.web.server import WaitingConnections

CHAT = "/v1/chat/completions"


def asking(text, **options):
    return request(CHAT, {"messages": [{"role": "user", "content": text}]} | options)


def send_for_ever(connection):
    while True:
        connection.sendall(b"x")
        time.sleep(0.05)


def read_until(connection, words):
    data = b""
    while words not in data:
        piece = connection.recv(65536)
        assert piece, data
        data += piece
    return data


@pytest.fixture
def with_impatient(serve):
    """Take steps with a server that waits 0.3 s for a request, and for a client to take an answer.

    On a busy machine a step may take longer. Then they are taken with servers of more patience.
    """

    def take(steps):
        for patience in (0.3, 3):
            with suppress(AssertionError, OSError):
                return steps(serve(limits={"timeout": patience}))
        return steps(serve(limits={"timeout": 15}))

    return take


@pytest.mark.parametrize("options", [{}, {"stream": True}, {"stream": True, "n": 3}], ids=str)
def test_a_client_that_leaves_ends_all_its_answers(served, options):
    count = options.get("n", 1)
    with served.connect() as connection:
        connection.sendall(asking("say:a{hang}", **options))
        wait_until(lambda: served.model.stats.running == count)
    wait_until(lambda: served.model.stats.cancelled == count)
    assert served.model.stats.running == 0
    assert served.reports == []


@pytest.mark.parametrize(
    "text", ["say:well", "say:we" + "{wait}" * 20 + "ll"], ids=["now", "later"]
)
def test_a_client_that_sends_no_more_gets_its_answer(served, text):
    """`nc -N` closes its side of the connection behind the request. It got nothing."""
    with served.connect() as connection:
        connection.sendall(asking(text))
        connection.shutdown(socket.SHUT_WR)
        data = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = data.rpartition(b"\r\n\r\n")
    *interim, last = head.split(b"\r\n\r\n")
    assert set(interim) <= {b"HTTP/1.1 102 Processing"}
    assert bool(interim) == ("{wait}" in text)
    assert last.startswith(b"HTTP/1.1 200")
    assert json.loads(body)["choices"][0]["message"]["content"] == "well"


@pytest.mark.parametrize(
    "data",
    [b"", b"GET /health HTTP/1.1\r\n", asking("Hi")[:-3], asking("a").replace(b"1.1", b"1.0", 1)],
    ids=["nothing", "headers", "body", "HTTP/1.0"],
)
def test_a_client_that_leaves_in_the_midst_of_a_request_is_closed(served, data):
    with served.connect() as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(65536):
            pass
    wait_until(lambda: served.server.connections == 0)


def test_two_requests_before_the_end_of_sending_are_both_answered(served):
    with served.connect() as connection:
        connection.sendall(asking("say:well") + request("/health"))
        connection.shutdown(socket.SHUT_WR)
        assert read_response(connection).json["choices"][0]["message"]["content"] == "well"
        assert read_response(connection).json == {"status": "ok"}
        assert connection.recv(1) == b""


def test_a_client_that_leaves_while_it_waits_for_its_turn_is_forgotten(serve):
    served = serve(parallel=1)
    with served.connect() as first:
        first.sendall(asking("say:a{hang}"))
        wait_until(lambda: served.model.stats.running)
        with served.connect() as second:
            second.sendall(asking("say:b{hang}"))
            wait_until(lambda: served.model.stats.waiting == 1)
    wait_until(lambda: served.model.stats.cancelled == 2)


def test_the_reading_of_a_prompt_is_told_in_comments(served):
    with served.connect() as connection:
        connection.sendall(asking("say:well", stream=True))
        data = read_until(connection, b"[DONE]")
    prompt = len("user: say:well\n")
    assert f": read 0 of {prompt} tokens\r\n".encode() not in data  # an event ends with \n\n
    assert f": read 0 of {prompt} tokens\n\n".encode() in data


def test_a_job_that_waits_is_pinged(monkeypatch, served):
    monkeypatch.setattr(answers, "PING_S", 0.05)
    with served.connect() as connection:
        connection.sendall(asking("say:a{hang}", stream=True))
        read_until(connection, b": waiting\n\n")


def ended(stats):
    return stats.finished, stats.cancelled


def test_a_client_that_takes_nothing_holds_nobody_up_and_is_cut_off(with_impatient):
    @with_impatient
    def steps(served):
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect(("127.0.0.1", served.port))
            # With log probabilities an answer of 900 tokens fills every buffer on the way.
            given = {"stream": True, "logprobs": True, "top_logprobs": 3, "n": 16, "max_tokens": 0}
            slow.sendall(asking("say:" + "a" * 900, **given))
            # On a slow machine the client is cut off before the last answers have ended.
            wait_until(lambda: sum(ended(served.model.stats)) == 16)
            assert exchange(served, request("/health")).status == 200
            wait_until(lambda: served.server.connections == 0)
        assert served.reports == []


@pytest.mark.parametrize(
    "data",
    [b"", b"GET", b"GET /health HTTP/1.1\r\nhost: localhost\r\n", asking("Hi")[:-3]],
    ids=["nothing", "method", "headers", "body"],
)
def test_a_request_that_does_not_end_is_told_so_and_closed(with_impatient, data):
    @with_impatient
    def steps(served):
        with served.connect() as connection:
            connection.sendall(data)
            if data:
                response = read_response(connection)
                assert (response.status, response.error["code"]) == (408, "request_timeout")
            assert connection.recv(1) == b""


def test_a_byte_now_and_then_buys_no_time(serve):
    served = serve(limits={"timeout": 0.3})
    with served.connect() as connection, pytest.raises(ConnectionError):
        send_for_ever(connection)


def test_a_connection_is_used_again_and_closed_when_it_is_idle(with_impatient):
    @with_impatient
    def steps(served):
        with served.connect() as connection:
            for _ in range(2):
                connection.sendall(request("/health"))
                assert read_response(connection).status == 200
            assert connection.recv(1) == b""


def test_an_answer_may_take_longer_than_the_patience_for_a_request(with_impatient):
    @with_impatient
    def steps(served):
        response = exchange(served, asking("say:a" + "{wait}" * 10 + "b"))
        assert response.json["choices"][0]["message"]["content"] == "ab"


def test_a_request_that_comes_with_many_connections_is_answered(serve):
    """It was closed as the oldest of them, before its bytes were read."""
    served = serve(limits={"waiting": WaitingConnections(4)})
    with served.connect() as first:
        silent = [served.connect() for _ in range(8)]
        first.sendall(request("/health"))
        assert read_response(first).status == 200
    for connection in silent:
        connection.close()


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: a\x00b\r\n\r\n",
        b"GET /health HTTP/1.1\r\nhost: localhost\r\nhost: localhost\r\n\r\n",
        b"GET /health\r\n HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-length: -1\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1\r\n"
        b"content-length: 2\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"GET /health HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 70_000,
    ],
)
def test_what_is_no_http_is_refused(served, data):
    with served.connect() as connection:
        connection.sendall(data)
        refused = read_response(connection)
        assert (refused.status, refused.error["code"]) == (400, "invalid_http")  # it was text
    assert exchange(served, request("/health")).status == 200


def test_a_body_in_tiny_chunks_is_refused(served):
    """300 kB in chunks of one byte kept the event loop from all others for 1.5 s of computing."""
    head = request(CHAT, b"", content_length=None, transfer_encoding="chunked")
    with served.connect() as connection:
        with suppress(ConnectionError):
            connection.sendall(head + b"1\r\nx\r\n" * 50_000)
        refused = read_response(connection)
    assert (refused.status, refused.error["code"]) == (413, "request_too_large")
    body = asking("say:well").rpartition(b"\r\n\r\n")[2]
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
    for _ in range(2):  # the chunks of each request are counted by themselves
        assert exchange(served, head + chunks + b"0\r\n\r\n").status == 200


def test_a_body_that_comes_behind_its_refusal_leaves_no_deadline_for_the_next_answer(
    with_impatient,
):
    """The deadline of the refused request cut a long answer on the same connection."""

    @with_impatient
    def steps(served):
        with served.connect() as connection:
            head, body = request("/nowhere", b"{}").split(b"\r\n\r\n")
            connection.sendall(head + b"\r\n\r\n")
            assert read_response(connection).status == 404
            connection.sendall(body)
            connection.sendall(asking("say:a" + "{wait}" * 20 + "b", stream=True))
            assert b"[DONE]" in read_until(connection, b"[DONE]")


def test_a_request_behind_another_has_a_deadline_for_its_body(with_impatient):
    @with_impatient
    def steps(served):
        with served.connect() as connection:
            unfinished = request(CHAT, b"123456789")[:-9]
            connection.sendall(request("/health") + unfinished)
            assert read_response(connection).status == 200
            while connection.recv(65536):
                pass


def test_two_lengths_of_one_body_are_refused(served):
    """The server went by one, a proxy before it may go by the other: a smuggled request."""
    smuggled = b"0\r\n\r\nGET /metrics HTTP/1.1\r\nhost: localhost\r\n\r\n"
    with served.connect() as connection:
        connection.sendall(request(CHAT, smuggled, transfer_encoding="chunked"))
        refused = read_response(connection)
        assert (refused.status, refused.headers["connection"]) == (400, "close")
        assert "Content-Length and Transfer-Encoding" in refused.error["message"]
        assert connection.recv(1) == b""


def test_connections_send_at_once():
    """Each answer took 40 ms: the listening socket did not name TCP, so asyncio set no NODELAY."""
    with bind(resolve("127.0.0.1:0", any_port=True)) as listener:
        assert listener.proto == socket.IPPROTO_TCP


def test_a_client_that_leaves_ends_the_check_of_its_schema(serve):
    """It went on with a core and gigabytes."""
    served = serve(compile_form=None, form_seconds=60)
    form = {"type": "json_schema", "json_schema": {"schema": bomb()}}
    before = children()
    with served.connect() as connection:
        connection.sendall(asking("Hi", response_format=form))
        wait_until(lambda: children() - before)
    wait_until(lambda: children() <= before)
    assert exchange(served, asking("say:well")).status == 200


def children():
    return set(psutil.Process().children())
