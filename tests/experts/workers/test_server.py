"""A worker among strangers, faulty chats and signals: the next rightful chat is always served."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest
import torch
from worker_double import (
    HELLO,
    KEY,
    PATIENCE,
    STUCK_LAYER,
    Doubles,
    ThreadedWorker,
    WorkerProcess,
    outputs,
)

from mixchat.errors import MixchatError, UsageError
from mixchat.experts.keys import ExpertKey
from mixchat.experts.workers import door, group, messages
from mixchat.experts.workers.address import Address, resolve
from mixchat.experts.workers.connection import Connection, ConnectionLostError, connect
from mixchat.experts.workers.group import CHAT, Group
from mixchat.experts.workers.handshake import MAGIC, Proofs, greet_worker
from mixchat.experts.workers.link import Link, WorkerLostError
from mixchat.experts.workers.messages import Kind, Request
from mixchat.experts.workers.server import Server

TOKEN = [(2, 1), (5, 1)]


def row() -> torch.Tensor:
    return torch.randn(1, HELLO.hidden_size).bfloat16()


def assert_serves(worker: ThreadedWorker) -> None:
    """A rightful chat opens, within the deadlines of a link, and gets its rows."""
    link, x = worker.open(silence=PATIENCE), row()
    link.start(2, TOKEN, x)
    assert torch.equal(link.finish(), outputs(2, TOKEN, x, True))
    link.close()


def dial(address: Address) -> Connection:
    return connect(address, time.monotonic() + PATIENCE)


def prove(address: Address) -> tuple[Connection, Proofs]:
    """A connection that has proved the key, and has said nothing else."""
    connection = dial(address)
    return connection, greet_worker(connection, KEY, time.monotonic() + PATIENCE)


def assert_closed(connection: Connection) -> None:
    """The worker closes the connection, whatever it sends before."""

    def read_all() -> None:
        while True:
            connection.receive_bytes(1, time.monotonic() + PATIENCE)

    with pytest.raises(ConnectionLostError, match=r"closed|reset"):
        read_all()
    connection.close()


def test_strangers_block_nobody(worker: ThreadedWorker) -> None:
    """Silence, garbage, half a handshake and wrong keys from 200 connections at once."""
    with ExitStack() as opened:
        for number in range(200):
            stranger = socket.create_connection(worker.address.target, PATIENCE)
            opened.callback(stranger.close)
            with suppress(OSError):
                stranger.sendall(
                    [b"", b"GET / HTTP/1.1\r\n\r\n", os.urandom(32), os.urandom(64)][number % 4]
                )
        assert_serves(worker)
    assert sum("sent away" in line for line in worker.notes) == 1  # one line, not one for each


def test_silent_strangers_are_sent_away(
    worker: ThreadedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "_DEADLINE", 0.2)
    connection = dial(worker.address)
    assert connection.receive_bytes(len(MAGIC), time.monotonic() + PATIENCE) == MAGIC
    assert_closed(connection)


def test_more_strangers_than_may_prove_the_key_at_once_have_to_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(door, "_MOST", 3)
    monkeypatch.setattr(door, "_DEADLINE", 0.5)
    worker = ThreadedWorker()
    strangers = [dial(worker.address) for _ in range(6)]
    assert_serves(worker)
    for stranger in strangers:
        stranger.close()
    worker.stop()


def test_who_proves_the_key_and_says_nothing_is_sent_away(
    worker: ThreadedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "_DEADLINE", 0.5)
    connection, _ = prove(worker.address)
    assert_closed(connection)


def hello_with(**changes: object) -> bytes:
    return json.dumps({**json.loads(messages.pack_fields(HELLO)), **changes}).encode()


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xff\xfe",
        b"[" * 50_000,
        b"[1, 2]",
        b"{}",
        hello_with(dtype="float64"),
        hello_with(hidden_size=0),
        hello_with(hidden_size=True),
        hello_with(hidden_size="64"),
        hello_with(model_name=None),
        hello_with(more=1),
    ],
    ids=lambda payload: payload[-30:].decode(errors="replace"),
)
def test_a_malformed_hello_ends_the_connection(worker: ThreadedWorker, payload: bytes) -> None:
    connection, _ = prove(worker.address)
    connection.send(Kind.HELLO, payload)
    assert_closed(connection)


def test_a_hello_of_another_kind_ends_the_connection(worker: ThreadedWorker) -> None:
    connection, _ = prove(worker.address)
    connection.send(Kind.HOLD, messages.pack_fields(HELLO))
    assert_closed(connection)


@pytest.fixture
def link(worker: ThreadedWorker) -> Iterator[Link]:
    opened = worker.open()
    yield opened
    opened.close()


REQUEST = messages.pack_request(Request(1, ((2, 1), (5, 1)), True))

ODD_FRAMES = {
    "no kind": (0, b""),
    "an unknown kind": (99, b"x"),
    "a second hello": (Kind.HELLO, messages.pack_fields(HELLO)),
    "a worker's word": (Kind.DONE, messages.pack_seconds(1)),
    "a word for the group": (Kind.STORE, b'["0/0", "00"]'),
    "nothing": (Kind.COMPUTE, b""),
    "no experts": (Kind.COMPUTE, REQUEST[:3] + bytes(2)),
    "half a request": (Kind.COMPUTE, REQUEST[:-1]),
    "a request and more": (Kind.COMPUTE, REQUEST + b"x"),
    "another flag": (Kind.COMPUTE, REQUEST[:2] + b"\2" + REQUEST[3:]),
    "a layer too high": (Kind.COMPUTE, struct.pack(">HBHHI", 4, 1, 1, 2, 1)),
    "an expert too high": (Kind.COMPUTE, struct.pack(">HBHHI", 1, 1, 1, 8, 1)),
    "no rows": (Kind.COMPUTE, struct.pack(">HBHHI", 1, 0, 1, 2, 0)),
    "more rows than fit": (Kind.COMPUTE, struct.pack(">HBHHI", 1, 0, 1, 2, 2**32 - 1)),
    "the same expert twice": (Kind.COMPUTE, struct.pack(">HBHHIHI", 1, 1, 2, 2, 1, 2, 1)),
    "one row for two of one": (Kind.COMPUTE, struct.pack(">HBHHI", 1, 1, 1, 2, 2)),
    "half a key": (Kind.HOLD, b"abc"),
    "a key twice": (Kind.HOLD, messages.pack_keys([ExpertKey(1, 2)] * 2)),
    "more keys than slots": (
        Kind.HOLD,
        messages.pack_keys([ExpertKey(1, expert) for expert in range(7)]),
    ),
    "a key's layer too high": (Kind.HOLD, messages.pack_keys([ExpertKey(4, 0)])),
    "a key's expert too high": (Kind.HOLD, messages.pack_keys([ExpertKey(0, 8)])),
}


@pytest.mark.parametrize("name", ODD_FRAMES)
def test_an_odd_message_ends_the_chat_and_the_next_one_is_served(
    worker: ThreadedWorker, link: Link, name: str
) -> None:
    link._connection.send(*ODD_FRAMES[name])
    assert_closed(link._connection)
    line = worker.wait_for_note("ends")
    assert line.endswith(("makes no sense", "out of turn", "does not have"))
    assert_serves(worker)


def test_a_message_that_is_too_long_ends_the_chat_before_it_is_read(
    worker: ThreadedWorker, link: Link
) -> None:
    link._connection.send_bytes(struct.pack(">BI", Kind.HOLD, 2**31))
    assert_closed(link._connection)
    assert "too long" in worker.wait_for_note("ends")


@pytest.mark.parametrize("rows", [1, 9])
def test_rows_that_never_come_end_the_chat(
    worker: ThreadedWorker, link: Link, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group, "_DEADLINE", 0.3)
    request = Request(1, ((2, rows),), rows == 1)
    link._connection.send(Kind.COMPUTE, messages.pack_request(request))
    assert_closed(link._connection)
    assert "do not arrive" in worker.wait_for_note("ends")
    assert_serves(worker)


@pytest.mark.parametrize("payload", [b"", b"{}", b'["0/0"]', b'["0/0", 5]', b'["0/0", "zz"]'])
def test_an_odd_word_for_the_group_ends_the_chat(worker: ThreadedWorker, payload: bytes) -> None:
    connection, _ = prove(worker.address)
    connection.send(Kind.HELLO, messages.pack_fields(HELLO))
    assert connection.receive(time.monotonic() + PATIENCE).kind == Kind.WELCOME
    connection.send(Kind.STORE, payload)
    assert_closed(connection)
    assert "makes no sense" in worker.wait_for_note("ends")
    assert_serves(worker)


def test_a_stranger_in_the_group_ends_the_chat(worker: ThreadedWorker) -> None:
    """The group's own port is open to all: its first rows must prove the key."""
    connection, proofs = prove(worker.address)
    connection.send(Kind.HELLO, messages.pack_fields(HELLO))
    assert connection.receive(time.monotonic() + PATIENCE).kind == Kind.WELCOME
    with suppress(ConnectionLostError):
        Group(connection, CHAT, Proofs(bytes(32), proofs.worker))
    assert_closed(connection)
    assert "a stranger is in the group" in worker.wait_for_note("ends")
    assert_serves(worker)


def test_a_worker_whose_group_has_a_stranger_is_lost(worker: ThreadedWorker) -> None:
    connection, proofs = prove(worker.address)
    connection.send(Kind.HELLO, messages.pack_fields(HELLO))
    assert connection.receive(time.monotonic() + PATIENCE).kind == Kind.WELCOME
    with pytest.raises(ConnectionLostError, match="stranger"):
        Group(connection, CHAT, Proofs(proofs.chat, bytes(32)))
    connection.close()


def test_a_fault_of_the_experts_ends_the_chat_only(worker: ThreadedWorker, link: Link) -> None:
    """Here the result has a wrong shape: a fault of mixchat, which the worker survives."""
    compute = worker.model.compute
    worker.model.compute = lambda *arguments: compute(*arguments)[:, 1:]
    link.start(1, TOKEN, row())
    with pytest.raises(WorkerLostError, match="AssertionError"):
        link.finish()
    worker.model.compute = compute
    assert_serves(worker)


def test_the_memory_is_looked_at_before_a_chat_and_while_nothing_is_asked_in_one(
    worker: ThreadedWorker,
) -> None:
    assert worker.model.has_followed.wait(PATIENCE)
    link = worker.open()
    worker.wait_for_note("begins")
    worker.model.has_followed.clear()
    assert worker.model.has_followed.wait(PATIENCE)
    link.close()
    worker.wait_for_note("ends")


def test_a_chat_may_ask_for_as_many_experts_as_it_was_told_that_there_is_room_for(
    worker: ThreadedWorker,
) -> None:
    """Other programs may have taken the memory since."""
    link, x = worker.open(), row()
    worker.wait_for_note("begins")
    worker.model.slots = 3
    link.hold([ExpertKey(1, expert) for expert in range(6)])
    link.start(2, TOKEN, x)
    assert torch.equal(link.finish(), outputs(2, TOKEN, x, True))
    link.close()


def test_a_fault_in_a_path_that_is_not_utf_8_ends_the_chat_only(
    worker: ThreadedWorker, link: Link
) -> None:
    """Its name could not be sent, and that ended the worker."""

    def fail(check: object) -> None:
        raise MixchatError("mod\udce8le/experts-001.safetensors: cannot be read")

    worker.model.on_compute = fail
    link.start(1, TOKEN, row())
    with pytest.raises(WorkerLostError, match=r"le/experts-001\.safetensors: cannot be read"):
        link.finish()
    worker.model.on_compute = lambda check: None
    assert_serves(worker)


CHAT_SIDE = """
import sys, torch
from worker_double import HELLO, KEY
from mixchat.experts.workers.address import resolve
from mixchat.experts.workers.link import Link
torch.set_num_threads(1)
link = Link.open(resolve(sys.argv[1]), KEY, HELLO)
link.start(1, [(2, 1), (5, 1)], torch.zeros(1, HELLO.hidden_size).bfloat16())
link.finish()
"""


def test_a_chat_side_that_is_killed_in_the_midst_of_a_request_frees_the_worker(
    worker: ThreadedWorker,
) -> None:
    computing = threading.Event()

    def never_end(check: object) -> None:
        computing.set()
        while True:
            check()  # type: ignore[operator]
            time.sleep(0.01)

    worker.model.on_compute = never_end
    command = [sys.executable, "-c", CHAT_SIDE, str(worker.address)]
    chat = subprocess.Popen(command, cwd=os.path.dirname(__file__))
    assert computing.wait(PATIENCE)
    chat.kill()
    chat.wait(PATIENCE)
    worker.wait_for_note("ends")
    worker.model.on_compute = lambda check: None
    assert_serves(worker)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("busy", [False, True])
def test_a_signal_ends_a_worker_cleanly(
    process: WorkerProcess, number: signal.Signals, busy: bool
) -> None:
    if busy:
        link = process.open()
        link.start(STUCK_LAYER, TOKEN, row())
        assert "begins" in process.next_line()
        assert process.next_line() == "computing"
    process.signal(number)
    assert process.wait() == 128 + number
    assert process.next_line() == "clean"
    if busy:
        with pytest.raises(WorkerLostError):
            link.finish()


def test_a_port_in_use_is_one_clear_line(worker: ThreadedWorker) -> None:
    with pytest.raises(UsageError, match="port is in use") as caught:
        door.listen(worker.address)
    assert "--listen" in (caught.value.hint or "")


def test_an_address_of_another_machine_is_one_clear_line() -> None:
    with pytest.raises(UsageError, match="no such address"):
        door.listen(resolve("192.0.2.1:7917"))


def test_a_worker_serves_chats_until_it_is_over() -> None:
    """Under torchrun it ended with the first one, so that a chat which had lost it was alone."""
    model, listener = Doubles(), door.listen(resolve("127.0.0.1:0", any_port=True))
    address, over = resolve(door.address_of(listener)), threading.Event()
    server = Server(listener, KEY, model, lambda line: None)
    thread = threading.Thread(target=server.serve, args=(over.is_set,))
    thread.start()
    for _ in range(2):
        link, x = Link.open(address, KEY, HELLO), row()
        link.start(2, TOKEN, x)
        assert torch.equal(link.finish(), outputs(2, TOKEN, x, True))
        link.close()
    over.set()
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_a_port_is_free_at_once_when_its_worker_has_ended() -> None:
    worker = ThreadedWorker()
    assert_serves(worker)
    worker.stop()
    again = ThreadedWorker(at=str(worker.address))
    assert_serves(again)
    again.stop()
