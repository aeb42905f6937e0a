"""A server that says what a script tells it, byte by byte, and notes what it was asked."""

from __future__ import annotations

import json
import socket
import struct
import threading
from dataclasses import dataclass, field
from typing import Any

LIST = {"object": "list", "data": [{"id": "tiny", "object": "model"}, {"id": "other"}]}
STREAM = {"Content-Type": "text/event-stream; charset=utf-8"}


class NothingAskedError(Exception):
    """A client connected, and left without a request."""


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: Any


@dataclass
class Answer:
    """The bytes of a body in pieces, and how it ends: close, reset, or hold until the client goes.

    `head` False: the pieces are all there is, without a status line.
    """

    pieces: list[bytes] = field(default_factory=list)
    status: str = "200 OK"
    headers: dict[str, str] = field(default_factory=lambda: dict(STREAM))
    end: str = "close"
    head: bool = True

    def send(self, connection: socket.socket) -> None:
        if self.head:
            lines = [f"HTTP/1.1 {self.status}", *(f"{k}: {v}" for k, v in self.headers.items())]
            connection.sendall(("\r\n".join([*lines, "", ""])).encode())
        for piece in self.pieces:
            connection.sendall(piece)


def event(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def delta(text: str | None, reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": reason}
    return event({"object": "chat.completion.chunk", "choices": [choice]})


def usage(prompt: int, generated: int, cached: int = 0) -> bytes:
    counts = {"prompt_tokens": prompt, "completion_tokens": generated}
    details = {"prompt_tokens_details": {"cached_tokens": cached}}
    return event({"choices": [], "usage": counts | details})


DONE = b"data: [DONE]\n\n"


def says(*texts: str, reason: str = "stop", counts: bytes = b"") -> Answer:
    """A whole answer, in these pieces."""
    return Answer([*map(delta, texts), delta(None, reason), counts, DONE])


def as_json(value: Any, status: str = "200 OK", **headers: str) -> Answer:
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    return Answer(
        [json.dumps(value).encode()], status, {"Content-Type": "application/json"} | named
    )


def refusal(status: str, message: str, code: str | None = None, **headers: str) -> Answer:
    return as_json({"error": {"message": message, "code": code}}, status, **headers)


class ScriptedServer:
    """`with ScriptedServer(answer, ...) as server`: each POST gets the next answer.

    `models` is the answer to GET. `holds` is set when an answer holds, `gone` when its client has
    gone.
    """

    def __init__(self, *answers: Answer, models: Answer | None = None) -> None:
        self.answers, self.models = list(answers), models or as_json(LIST)
        self.requests: list[Request] = []
        self.gone = threading.Event()
        self.holds = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = "127.0.0.1:{}".format(*self._listener.getsockname()[1:])
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> ScriptedServer:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def stop_holding(self) -> None:
        """Let an answer that holds end, although the client is still there."""
        self.holds.wait()
        self._held.shutdown(socket.SHUT_RDWR)

    def asked(self) -> list[Any]:
        """The bodies of all requests for an answer."""
        return [request.body for request in self.requests if request.method == "POST"]

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                try:
                    self._answer(connection)
                except NothingAskedError:
                    continue
                except OSError:  # the client went, perhaps while it was sent something
                    self.gone.set()

    def _answer(self, connection: socket.socket) -> None:
        request = read_request(connection)
        self.requests.append(request)
        answer = self.models if request.method == "GET" else self.answers.pop(0)
        answer.send(connection)
        if answer.end == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif answer.end == "hold":
            self._held = connection
            self.holds.set()
            connection.recv(1)
            self.gone.set()
        else:
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass


def read_request(connection: socket.socket) -> Request:
    with connection.makefile("rb") as file:
        first = file.readline()
        if not first:
            raise NothingAskedError
        method, path, _ = first.decode().split()
        headers = {}
        while line := file.readline().decode().strip():
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        size = int(headers.get("content-length", 0))
        return Request(method, path, headers, json.loads(file.read(size)) if size else None)
