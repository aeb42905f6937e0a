"""HTTP by hand, for what no client would send."""

import json
import socket
from dataclasses import dataclass
from typing import Any


@dataclass
class Response:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> Any:
        return self.json["error"]


def request(path: str, body: Any = None, *, method: str | None = None, **headers: str) -> bytes:
    """The bytes of a request; a body that is no bytes is sent as JSON. A header's _ is a -."""
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    named = {"host": "localhost", "content-length": str(len(data))}
    named |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{method or ('GET' if body is None else 'POST')} {path} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in named.items() if value is not None]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + data


def read_response(connection: socket.socket) -> Response:
    """Read one response, by its length or to the end of the connection, and not a byte more."""
    with connection.makefile("rb", buffering=0) as stream:
        first = stream.readline()
        if not first:
            raise ConnectionError("closed without a response")
        headers = {}
        while line := stream.readline().strip():
            name, _, value = line.decode("latin-1").partition(": ")
            headers[name.lower()] = value
        status = int(first.split()[1])
        length = 0 if status < 200 else int(headers.get("content-length", "-1"))
        body = b""
        while length != len(body) and (piece := stream.read(max(length - len(body), -1) % 65537)):
            body += piece
    return Response(status, headers, body)


def exchange(served: Any, data: bytes) -> Response:
    """Send bytes on a new connection, and return the response."""
    with served.connect() as connection:
        connection.sendall(data)
        return read_response(connection)
