"""Frames over a connection: whole whatever pieces they come in, and never waited for in vain."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest
from worker_double import PATIENCE

from mixchat.experts.workers import connection
from mixchat.experts.workers.address import resolve
from mixchat.experts.workers.connection import (
    Connection,
    ConnectionLostError,
    Frame,
    NoAnswerError,
    connect,
)


@pytest.fixture
def ends() -> Iterator[tuple[Connection, socket.socket]]:
    """A connection, and the plain socket at its other end."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host, port = listener.getsockname()
        opened = connect(resolve(f"{host}:{port}"), soon())
        other, _ = listener.accept()
    yield opened, other
    opened.close()
    other.close()


def soon() -> float:
    return time.monotonic() + PATIENCE


def test_frames_arrive_whole_in_whatever_pieces(ends: tuple[Connection, socket.socket]) -> None:
    here, other = ends
    data = struct.pack(">BI", 6, 3) + b"abc" + struct.pack(">BI", 7, 0)

    def dribble() -> None:
        for byte in data:
            other.sendall(bytes([byte]))
            time.sleep(0.001)

    thread = threading.Thread(target=dribble)
    thread.start()
    assert here.receive(soon()) == Frame(6, b"abc")
    assert here.receive(soon()) == Frame(7, b"")
    thread.join(PATIENCE)


def test_a_frame_that_has_arrived_is_returned_after_the_deadline(
    ends: tuple[Connection, socket.socket],
) -> None:
    """An end that was stopped for a while must not take the other one for silent."""
    here, other = ends
    other.sendall(struct.pack(">BI", 7, 0))
    while not here.has_arrived():
        time.sleep(0.001)
    assert here.receive(time.monotonic() - 1) == Frame(7, b"")
    with pytest.raises(NoAnswerError):
        here.receive(time.monotonic() - 1)


def test_an_end_in_the_midst_of_a_frame_is_an_end(ends: tuple[Connection, socket.socket]) -> None:
    here, other = ends
    assert not here.has_ended()
    other.sendall(struct.pack(">BI", 7, 10) + b"abc")
    other.close()
    with pytest.raises(ConnectionLostError, match="closed"):
        here.receive(soon())
    assert here.has_ended()


def test_a_reset_is_an_end(ends: tuple[Connection, socket.socket]) -> None:
    here, other = ends
    other.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    other.close()
    with pytest.raises(ConnectionLostError, match="reset"):
        here.receive(soon())
    with pytest.raises(ConnectionLostError):
        here.send(7)


def test_what_the_other_end_does_not_read_is_sent_when_it_does(
    ends: tuple[Connection, socket.socket],
) -> None:
    here, other = ends
    size, received = 20_000_000, 0

    def read() -> None:
        nonlocal received
        while received < size:
            received += len(other.recv(1 << 20))

    thread = threading.Timer(0.2, read)
    thread.start()
    here.send_bytes(bytes(size))
    thread.join(PATIENCE)
    assert received == size


def test_what_the_other_end_never_reads_ends_the_connection(
    ends: tuple[Connection, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "SEND_DEADLINE", 0.2)
    here, _ = ends
    with pytest.raises(NoAnswerError):
        here.send_bytes(bytes(20_000_000))


def test_a_vanished_end_is_noticed_by_the_kernel(ends: tuple[Connection, socket.socket]) -> None:
    here, _ = ends
    assert here._socket.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert here._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert here._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 1


def test_a_connection_that_nobody_accepts_is_late() -> None:
    """The queue of the listener is full, so the system leaves the next ones waiting."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        host, port = listener.getsockname()

        def connect_again_and_again() -> None:
            while True:
                connect(resolve(f"{host}:{port}"), time.monotonic() + 0.2).close()

        with pytest.raises(TimeoutError):
            connect_again_and_again()
