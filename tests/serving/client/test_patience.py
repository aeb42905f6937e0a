"""A server that sends without an end what is no answer, and servers that are only slow."""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest
from endless_server import endless_server
from scripted_server import DONE, LIST, Answer, ScriptedServer, as_json, delta, event, refusal

from mixchat.base.errors import ServerError
from mixchat.face.events import Piece
from mixchat.serving.client import patience
from mixchat.serving.client.patience import Patience
from mixchat.serving.client.server_client import ServerClient
from mixchat.serving.client.server_json import ListedModel, RefusedError
from mixchat.serving.client.server_model import ServerModel
from mixchat.serving.client.server_url import ServerURL

STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n%s\r\n"
JSON = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
EMPTY = event({"choices": [{"index": 0, "delta": {}}]})
THOUGHTLESS = delta("")
pytestmark = pytest.mark.timeout(120)


@contextmanager
def endless(head: bytes, piece: bytes, pause: float = 0.0) -> Iterator[ServerClient]:
    """A client of a server that answers with `head`, and then `piece` again and again."""
    with endless_server(head, piece, pause) as address:
        yield ServerClient(ServerURL.parse(address))


def answer_of(client: ServerClient) -> str:
    reply = ServerModel(client, ListedModel("tiny")).send({})
    try:
        return "".join(event.text for event in reply if isinstance(event, Piece))
    finally:
        reply.close()


@pytest.mark.parametrize(
    ("head", "piece"),
    [
        (b"", CONTINUE),
        (STREAM % b"", b": ping\n\n"),
        (STREAM % b"", b": waiting\n\n"),
        (STREAM % b"", b": read 1 of 999999999 tokens\n\n"),
        (STREAM % b"", EMPTY),
        (STREAM % b"", THOUGHTLESS),
        (STREAM % b"", b"\n"),
        (STREAM % b"", b"id: 5\n"),
        (STREAM % b"Transfer-Encoding: chunked\r\n", b"1;" + b"x" * 60_000 + b"\r\n:\r\n"),
    ],
    ids=lambda piece: piece[:30].decode(),
)
def test_what_is_no_answer_is_not_read_for_ever(monkeypatch, head, piece):
    """`mixchat run --server` hung until somebody pressed Ctrl-C."""
    monkeypatch.setattr(patience, "_BODY_BYTES", 2**20)
    with endless(head, piece) as client, pytest.raises(ServerError, match="no answer"):
        answer_of(client)


@pytest.mark.parametrize(("head", "piece"), [(b"", CONTINUE), (JSON, b" ")])
def test_a_list_of_models_without_an_end_is_given_up(head, piece):
    with endless(head, piece) as client, pytest.raises(ServerError, match="no answer"):
        client.models()


@pytest.mark.parametrize(
    ("head", "piece"),
    [(b"", CONTINUE), (JSON, b" "), (b"HTTP/1.1 200 OK\r\nA: ", b"x"), (JSON[:-2], b"A: b\r\n")],
)
def test_a_list_of_models_that_trickles_is_given_up(monkeypatch, head, piece):
    monkeypatch.setattr(patience, "_SMALL_S", 0.5)
    with endless(head, piece, 0.05) as client, pytest.raises(ServerError, match="too long"):
        client.models()


@pytest.mark.parametrize(
    ("head", "piece"),
    [(b"", CONTINUE), (STREAM % b"", b": ping\n\n"), (STREAM % b"", EMPTY), (STREAM % b"", b"d")],
)
def test_an_answer_of_which_nothing_comes_is_given_up(monkeypatch, head, piece):
    monkeypatch.setattr(patience, "_ANSWER_S", 0.5)
    monkeypatch.setattr(patience, "_BYTE_S", 0)
    with endless(head, piece, 0.05) as client, pytest.raises(ServerError, match="too long"):
        answer_of(client)


def test_a_server_that_takes_nothing_of_a_request_is_given_up(monkeypatch):
    monkeypatch.setattr("mixchat.serving.client.server_client._WRITE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as listener:  # whose connections nobody reads
        client = ServerClient(ServerURL.parse("127.0.0.1:{}".format(*listener.getsockname()[1:])))
        with pytest.raises(ServerError, match="takes too long"):
            client.chat({"messages": "x" * 50_000_000})


@pytest.mark.parametrize("said", [b"", b'{"error": {"message": "the prompt is'])
def test_the_reason_of_a_refusal_is_not_waited_for_long(monkeypatch, said):
    monkeypatch.setattr(patience, "_REASON_S", 0.3)
    head = b"HTTP/1.1 400 Bad\r\nContent-Type: application/json\r\n\r\n" + said
    with endless(head, b" ", 0.05) as client, pytest.raises(RefusedError) as caught:
        client.chat({})
    assert ("the prompt is" if said else "400, without a reason") in str(caught.value)


def test_a_long_reason_is_told():
    answer = refusal("400 Bad", "too many", "context_length_exceeded", X="y" * 9000)
    answer.pieces[0] = answer.pieces[0][:-1] + b', "input": "' + b"x" * 500_000 + b'"}'
    with ScriptedServer(answer) as server, pytest.raises(Exception, match="too many"):
        ServerClient(ServerURL.parse(server.address)).chat({})


def test_a_large_list_and_a_long_answer_are_read_to_their_ends():
    models = {"object": "list", "data": [*LIST["data"], *({"id": f"m{n}"} for n in range(9000))]}
    long = Answer([*[delta("word ")] * 3000, delta("!", "stop"), DONE])
    with ScriptedServer(long, models=as_json(models)) as server:
        client = ServerClient(ServerURL.parse(server.address))
        assert len(client.models()) == 9002
        assert answer_of(client) == "word " * 3000 + "!"


class Clock:
    """The time, which stands until `pass_`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(patience.time, "monotonic", lambda: self.now)

    def pass_(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


HOUR = 3600.0


def test_a_long_silent_prompt_is_waited_for(clock):
    """Some servers say nothing while they read: 32,000 tokens at one a second take 9 hours."""
    waiting = Patience(4 * 32_000)
    clock.pass_(32_000)
    assert waiting.seconds() > 0
    clock.pass_(HOUR)
    with pytest.raises(ServerError):
        waiting.seconds()


def test_an_hour_without_a_token_is_too_long(clock):
    waiting = Patience(100)
    for _ in range(100):
        clock.pass_(HOUR - 60)
        waiting.take_text(1)
        for _ in range(59):
            clock.pass_(1)
            waiting.take_text(4)
        assert waiting.seconds() > HOUR / 2
    clock.pass_(HOUR + 1)
    with pytest.raises(ServerError):
        waiting.seconds()


def gives_up_after(clock: Clock, waiting: Patience, happens: Callable[[int], None]) -> float:
    """The hours until nothing is left, if something happens once in 50 minutes."""
    began = clock.now
    for number in range(10_000):
        clock.pass_(50 * 60)
        try:
            waiting.seconds()
        except ServerError:
            return (clock.now - began) / HOUR
        happens(number)
    raise AssertionError("it waits for ever")


@pytest.mark.parametrize(
    ("happens", "least", "most"),
    [
        (lambda waiting, number: waiting.take_text(1), 0, 3),  # a token buys a minute
        (lambda waiting, number: waiting.wait_in_queue(), 11, 14),
        # 65,636 tokens, 60 in 50 minutes
        (lambda waiting, number: waiting.read(60 * (number + 1)), 500, 2000),
        (lambda waiting, number: waiting.read(5), 0, 3),
        (lambda waiting, number: waiting.read(10**8 + number), 0, 3),
    ],
    ids=["tokens now and then", "queue", "progress", "no progress", "beyond the prompt"],
)
def test_what_happens_now_and_then_buys_some_hours(clock, happens, least, most):
    waiting = Patience(100)
    hours = gives_up_after(clock, waiting, lambda number: happens(waiting, number))
    assert least < hours < most


def test_after_its_end_an_answer_buys_no_time(clock):
    waiting = Patience(100)
    waiting.end_soon()
    waiting.take_text(1)
    waiting.read(10)
    waiting.wait_in_queue()
    clock.pass_(2)
    with pytest.raises(ServerError):
        waiting.seconds()


def test_pieces_with_little_text_and_many_bytes_come_to_an_end():
    waiting = Patience(100)
    waiting.begin()
    waiting.take(2**24)
    for _ in range(10):
        with suppress(ServerError):
            waiting.take_text(1)
            waiting.take(2**20)
    with pytest.raises(ServerError, match="no answer"):
        waiting.take(0)
