"""A worker among strangers, faulty chats and signals: the next rightful chat is always served."""

import gc
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import pytest
import torch
from patience import PATIENCE_S
from worker_double import (
    HELLO,
    KEY,
    STUCK_LAYER,
    TOKEN,
    NeverEnding,
    ThreadedWorker,
    WorkerProcess,
    ask,
    assert_right,
    outputs,
    row,
)

from mixchat.base.errors import MixchatError, UsageError
from mixchat.experts.cache import ExpertKey
from mixchat.experts.workers import sockets
from mixchat.experts.workers.address import Address, resolve
from mixchat.experts.workers.link import Link, WorkerSocket
from mixchat.experts.workers.listener import Listener
from mixchat.experts.workers.messages import (
    Compute,
    Computed,
    Ended,
    Hold,
    Refusal,
    WorkerMessage,
    expect,
    pack,
    unpack,
)
from mixchat.experts.workers.sockets import PIECE, ConnectionLostError, curve_keys


def assert_serves(worker: ThreadedWorker) -> None:
    """A rightful chat opens, within the deadlines of a link, and gets its rows."""
    link = worker.open(silence=PATIENCE_S)
    assert_right(link)
    link.close()


def answer_to(opened: WorkerSocket, message: bytes) -> WorkerMessage:
    opened.send(message)
    return unpack(opened.receive(time.monotonic() + PATIENCE_S))[0]


def test_strangers_block_nobody_and_do_not_show_in_a_chat(worker, link):
    """Some connections to gloo's port ended the worker, before anybody had proved a key.

    Here 300 bring silence, garbage, half a handshake and an end, while rows travel.
    """
    greeting = b"\xff" + bytes(8) + b"\x7f\x03\x01CURVE".ljust(22, b"\0") + bytes(32)
    said = [b"", b"GET / HTTP/1.1\r\n\r\n", os.urandom(200), greeting, greeting + os.urandom(300)]
    with ExitStack() as opened:
        for number in range(300):
            stranger = socket.create_connection(worker.address.target, PATIENCE_S)
            opened.callback(stranger.close)
            with suppress(OSError):
                stranger.sendall(said[number % len(said)])
            if number % 10 == 0:
                assert_right(link)
    link.close()
    assert_serves(worker)


def test_one_line_tells_of_many_with_another_key(worker):
    for _ in range(3):
        with pytest.raises(UsageError, match="another key"):
            WorkerSocket(worker.address, bytes(32))
    assert_serves(worker)
    assert sum("sent away" in line for line in worker.notes) == 1


@pytest.mark.skipif(shutil.which("prlimit") is None, reason="needs prlimit of util-linux")
def test_strangers_leave_a_worker_the_files_that_it_needs():
    """It ended with "/proc/meminfo: Too many open files" when 1,300 connections were there."""
    process = WorkerProcess(files=256)
    try:
        link = process.open(silence=PATIENCE_S)
        with ExitStack() as opened:
            for _ in range(300):
                stranger = socket.create_connection(process.address.target, PATIENCE_S)
                opened.callback(stranger.close)
            for _ in range(20):
                assert_right(link)
            link.close()
            deadline = time.monotonic() + PATIENCE_S
            while True:  # until the handshakes of the first strangers are out of time
                with suppress(MixchatError):
                    link = process.open(silence=PATIENCE_S)
                    break
                assert time.monotonic() < deadline
            assert_right(link)
        link.close()
    finally:
        process.end()


def test_a_model_that_cannot_be_opened_for_a_chat_refuses_this_one_only(worker):
    """A model that could not tell its room ended the worker."""

    class Closed(type(worker.model)):
        @property
        def slots(self):
            raise OSError(24, "Too many open files")

        @slots.setter
        def slots(self, count): ...

    rightful, worker.model.__class__ = worker.model.__class__, Closed
    opened = WorkerSocket(worker.address, KEY)
    refused = expect(Refusal, answer_to(opened, pack(HELLO)))
    assert "Too many open files" in refused.text
    opened.close()
    worker.model.__class__ = rightful
    assert_serves(worker)


def test_silent_strangers_are_sent_away(worker):
    with socket.create_connection(worker.address.target, PATIENCE_S) as stranger:
        while received := stranger.recv(100):
            pass
        assert received == b""


def test_who_knows_the_public_key_alone_is_sent_away(worker, monkeypatch):
    """The worker's public key never travels; still, the chat side has to have its own secret."""

    def half_right(key, end):
        return curve_keys(bytes(32) if end == b"chat" else key, end)

    monkeypatch.setattr(sockets, "curve_keys", half_right)
    with pytest.raises(UsageError, match="another key"):
        WorkerSocket(worker.address, KEY)


def test_what_travels_is_encrypted(worker):
    """Somebody between both ends sees no name of the model, and passes on what works.

    So does an SSH port forward: there is one port, and one connection.
    """
    passed = bytearray()
    with forwarded(worker.address, passed) as address:
        link, x = Link(address, KEY, HELLO), torch.ones(1, HELLO.hidden_size).bfloat16()
        assert torch.equal(ask(link, 2, TOKEN, x), outputs(2, TOKEN, x, True))
        link.close()
    assert b"CURVE" in passed
    assert HELLO.model_identity.encode() not in passed
    assert b"words" not in passed
    assert x.view(torch.uint8).numpy().tobytes() not in passed


@contextmanager
def forwarded(target: Address, passed: bytearray) -> Iterator[Address]:
    """Pass on one connection to an address, and note what is passed."""

    def carry(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                passed.extend(data)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    with socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as opened:

        def accept() -> None:
            here, _ = listener.accept()
            there = socket.create_connection(target.target)
            opened.callback(here.close)
            opened.callback(there.close)
            back = threading.Thread(target=carry, args=(there, here))
            back.start()
            carry(here, there)
            back.join(PATIENCE_S)

        thread = threading.Thread(target=accept)
        thread.start()
        yield resolve(f"127.0.0.1:{listener.getsockname()[1]}")
        thread.join(PATIENCE_S)


def hello_with(**changes: object) -> bytes:
    return json.dumps({**json.loads(pack(HELLO)), **changes}).encode()


def test_a_malformed_hello_is_refused(worker):
    for message in (
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
        hello_with(type="hold"),
        pack(HELLO, b"rows"),
    ):
        opened = WorkerSocket(worker.address, KEY)
        assert expect(Refusal, answer_to(opened, message)).cause == "other"
        opened.close()
    assert_serves(worker)


def test_a_connection_in_a_circle_of_references_is_collected(worker):
    """The garbage collector hung for ever, in whatever it interrupted: the context waited for its
    sockets, which were not closed yet."""
    opened = WorkerSocket(worker.address, KEY)
    opened.itself = opened
    end = opened.close
    del opened
    collecting = threading.Thread(target=gc.collect, daemon=True)
    collecting.start()
    collecting.join(PATIENCE_S)
    assert not collecting.is_alive()
    assert not end.alive


ROW = bytes(2 * HELLO.hidden_size)
REQUEST = Compute(layer=1, experts=((2, 1), (5, 1)), shared_row=True)


def request_with(**changes: object) -> bytes:
    fields = {**json.loads(pack(REQUEST)), **changes}
    return json.dumps(fields).encode() + b"\n" + ROW


def hold(*keys: object) -> bytes:
    return json.dumps({"type": "hold", "keys": keys}).encode()


ODD_MESSAGES = {
    "nothing": b"",
    "no JSON": b"\0x",
    "an unknown kind": b'{"type": "x"}',
    "a second hello": pack(HELLO),
    "a worker's word": pack(Computed(seconds=1)),
    "no experts": request_with(experts=[]),
    "half a request": pack(REQUEST)[:-2],
    "no row": pack(REQUEST),
    "a row of another size": pack(REQUEST, 10 * ROW),
    "another flag": request_with(shared_row=2),
    "a layer too high": request_with(layer=4),
    "a layer below 0": request_with(layer=-1),
    "an expert too high": request_with(experts=[[8, 1]]),
    "an expert below 0": request_with(experts=[[-1, 1]]),
    "no rows": request_with(experts=[[2, 0]], shared_row=False),
    "more rows than fit": request_with(experts=[[2, 2**32]], shared_row=False),
    "more rows together than fit": request_with(experts=[[2, 2**16], [3, 1]], shared_row=False),
    "the same expert twice": request_with(experts=[[2, 1], [2, 1]]),
    "one row for two of one": request_with(experts=[[2, 2]]),
    "half a key": hold([1]),
    "a key twice": hold([1, 2], [1, 2]),
    "more keys than slots": hold(*([1, expert] for expert in range(7))),
    "keys and rows": pack(Hold(keys=()), ROW),
    "a key's layer too high": hold([4, 0]),
    "a key's expert too high": hold([0, 8]),
}


def test_an_odd_message_ends_the_chat_and_the_next_one_is_served(worker):
    for message in ODD_MESSAGES.values():
        link = worker.open(silence=PATIENCE_S)
        reason = expect(Ended, answer_to(link._socket, message)).reason
        assert reason.endswith(("makes no sense", "out of turn", "does not have", "another size"))
        link.close()
    assert_serves(worker)


def test_a_message_that_is_too_long_ends_the_chat_before_it_is_read(worker, link):
    link._socket.send(bytes(2 * PIECE))
    assert "closed the connection" in worker.wait_for_note("ends")
    assert_serves(worker)


def test_rows_that_never_come_end_the_chat(worker, link, monkeypatch):
    monkeypatch.setattr(sockets, "SILENCE_S", 0.3)
    rows = 2 * PIECE // len(ROW)
    request = Compute(layer=1, experts=((2, rows),), shared_row=False)
    link._socket.send(pack(request, bytes(PIECE)))
    assert "do not arrive" in worker.wait_for_note("ends")
    assert_serves(worker)


def test_a_fault_of_the_experts_ends_the_chat_only(worker, link):
    """Here the result has a wrong shape: a fault of mixchat, which the worker survives."""
    compute = worker.model.compute
    worker.model.compute = lambda *arguments: compute(*arguments)[:, 1:]
    link.start(1, TOKEN, row())
    with pytest.raises(ConnectionLostError, match="AssertionError"):
        link.finish()
    worker.model.compute = compute
    assert_serves(worker)


def test_the_memory_is_looked_at_before_a_chat_and_while_nothing_is_asked_in_one(worker):
    assert worker.model.has_followed.wait(PATIENCE_S)
    link = worker.open()
    worker.wait_for_note("begins")
    worker.model.has_followed.clear()
    assert worker.model.has_followed.wait(PATIENCE_S)
    link.close()
    worker.wait_for_note("ends")


def test_a_chat_may_ask_for_as_many_experts_as_it_was_told_that_there_is_room_for(worker):
    """Other programs may have taken the memory since."""
    link = worker.open()
    worker.wait_for_note("begins")
    worker.model.slots = 3
    link.hold([ExpertKey(1, expert) for expert in range(6)])
    assert_right(link)
    link.close()


def test_a_fault_in_a_path_that_is_not_utf_8_ends_the_chat_only(worker, link):
    """Its name could not be sent, and that ended the worker."""

    def fail(check):
        raise MixchatError("mod\udce8le/experts-001.safetensors: cannot be read")

    worker.model.on_compute = fail
    link.start(1, TOKEN, row())
    with pytest.raises(ConnectionLostError, match=r"le/experts-001\.safetensors: cannot be read"):
        link.finish()
    worker.model.on_compute = lambda check: None
    assert_serves(worker)


CHAT_SIDE = """
import sys, torch
from worker_double import HELLO, KEY
from mixchat.experts.workers.address import resolve
from mixchat.experts.workers.link import Link, WorkerSocket
torch.set_num_threads(1)
link = Link(resolve(sys.argv[1]), KEY, HELLO)
link.start(1, [(2, 1), (5, 1)], torch.zeros(1, HELLO.hidden_size).bfloat16())
link.finish()
"""


def test_a_chat_side_that_is_killed_in_the_midst_of_a_request_frees_the_worker(worker):
    worker.model.on_compute = never_end = NeverEnding()
    command = [sys.executable, "-c", CHAT_SIDE, str(worker.address)]
    chat = subprocess.Popen(command, cwd=os.path.dirname(__file__))
    assert never_end.started.wait(PATIENCE_S)
    chat.kill()
    chat.wait(PATIENCE_S)
    worker.wait_for_note("ends")
    worker.model.on_compute = lambda check: None
    assert_serves(worker)


@pytest.mark.parametrize(
    ("number", "busy"), [(signal.SIGINT, True), (signal.SIGTERM, True), (signal.SIGINT, False)]
)
def test_a_signal_ends_a_worker_cleanly(process, number, busy):
    if busy:
        link = process.open()
        link.start(STUCK_LAYER, TOKEN, row())
        assert "begins" in process.next_line()
        assert process.next_line() == "computing"
    process.signal(number)
    assert process.wait() == 128 + number
    assert process.next_line() == "clean"
    if busy:
        with pytest.raises(ConnectionLostError):
            link.finish()


def test_a_port_in_use_is_one_clear_line(worker):
    with pytest.raises(UsageError, match="port is in use") as caught:
        Listener(worker.address, KEY, print)
    assert "--listen" in (caught.value.hint or "")


def test_an_address_of_another_machine_is_one_clear_line():
    with pytest.raises(UsageError, match="no such address"):
        Listener(resolve("192.0.2.1:7917"), KEY, print)


def test_a_worker_serves_chats_until_it_is_over():
    worker = ThreadedWorker()
    for _ in range(2):
        assert_serves(worker)
    worker.stop()
    again = ThreadedWorker(at=str(worker.address))  # its port is free at once
    assert_serves(again)
    again.stop()
