"""Many connections of strangers, for a server that may open few files."""

import os
import resource
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import fake_serve
import pytest
from forked_program import ForkedProgram
from raw_http import exchange, read_response, request
from test_web_process import Process

from mixchat.serving.web import acceptor, server
from mixchat.serving.web.server import WaitingConnections

FILES = 128
pytestmark = pytest.mark.timeout(240)


@contextmanager
def crowd(connect, count: int, said: bytes = b"") -> Iterator[None]:
    """So many connections that stay open and send no more than this."""
    with ExitStack() as opened:
        for _ in range(count):
            stranger = opened.enter_context(connect())
            if said:
                stranger.sendall(said)
        yield


def serve_with_few_files(arguments):
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))
    fake_serve.main(arguments)


@pytest.mark.parametrize("said", [b"", b"POST /v1/chat/comple"], ids=["silence", "beginnings"])
def test_a_crowd_takes_no_descriptor_that_the_server_needs(tmp_path, said):
    """1,300 connections closed a server with 1,024 descriptors for half a minute.

    asyncio printed 400,000 lines of tracebacks meanwhile.
    """
    environment = {**os.environ, "MIXCHAT_HOME": str(tmp_path)}
    process = Process(ForkedProgram(serve_with_few_files, ["--port", "0"], environment))
    try:
        with crowd(process.connect, 3 * FILES, said):
            for _ in range(3):
                assert exchange(process, request("/health")).status == 200
                if (files := Path(f"/proc/{process.program.pid}/fd")).exists():
                    assert len(os.listdir(files)) < FILES - 16
        process.program.send_signal(signal.SIGTERM)
        assert process.end() == (143, "")
    finally:
        process.program.close()


def test_above_the_limit_silent_connections_make_room(serve, monkeypatch):
    monkeypatch.setattr(server, "most_connections", lambda: 4)
    served = serve()
    with crowd(served.connect, 12):
        assert exchange(served, request("/health")).status == 200
        assert served.server.connections <= 4


def test_a_connection_with_a_request_does_not_make_room(serve, monkeypatch):
    monkeypatch.setattr(server, "most_connections", lambda: 4)
    served = serve()
    asked = request("/v1/chat/completions", {"messages": [{"role": "user", "content": "say:a"}]})
    with served.connect() as slow:
        slow.sendall(asked[:-1])
        with crowd(served.connect, 12):
            assert exchange(served, request("/health")).status == 200
            slow.sendall(asked[-1:])
            assert read_response(slow).status == 200


def test_a_connection_that_cannot_be_accepted_is_tried_again(serve, monkeypatch):
    """Another part of the process may have taken more descriptors than are held back."""
    failures = [OSError(24, "Too many open files"), OSError(23, "Too many open files in system")]
    accept = socket.socket.accept

    def fail_first(self):
        if failures and self.getsockname()[1] == served.port:
            raise failures.pop()
        return accept(self)

    served = serve()
    monkeypatch.setattr(socket.socket, "accept", fail_first)
    assert exchange(served, request("/health")).status == 200
    assert not failures


def test_connections_that_wait_too_long_are_closed_although_no_other_comes(serve):
    """They were looked at only when another one was accepted."""
    served = serve(limits={"waiting": WaitingConnections(4, grace=0.2)})
    with ExitStack() as opened:
        silent = [opened.enter_context(served.connect()) for _ in range(8)]
        for connection in silent[:4]:
            assert connection.recv(1) == b""
        assert served.server.connections == 4


@pytest.mark.parametrize(
    ("left", "most"), [(None, 8192), (1000, 744), (8000, 7744), (40, 14), (3, 8)]
)
def test_the_limit_leaves_files_for_the_server_itself(monkeypatch, left, most):
    monkeypatch.setattr(acceptor.system, "allow_open_files", lambda count: None)
    monkeypatch.setattr(acceptor.system, "open_files_left", lambda: left)
    assert acceptor.most_connections() == most
