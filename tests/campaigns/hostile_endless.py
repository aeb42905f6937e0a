"""Input without an end in place of every file, pipe and answer that is read: refused in time.

Answers come as fast as they can, or a piece in a second. For those the client waits for seconds
here instead of minutes and hours.
"""

import contextlib
import gzip
import json
import os
import signal
import socket
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import rig
from hostile import Found, judged

ZERO = "/dev/zero"
SPARSE = 1 << 33  # bytes of a file that takes no room
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\n\r\n"
CHUNKS = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nTransfer-Encoding: chunked\r\n\r\n"
COMPRESSED = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Encoding: gzip\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
REDIRECT = b"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\n\r\n"
REFUSAL = b"HTTP/1.1 400 Bad\r\nContent-Type: application/json\r\n\r\n"
EXTENSION = b"1;" + b"x" * 60_000 + b"\r\n:\r\n"  # of a chunk
EMPTY_BLOCK = b"\x00\x00\x00\xff\xff"  # of deflate
SERVERS: list[int] = []  # their processes
_LISTED = CONTINUE  # the beginning of an answer whose server has a list of models
MODELS = HEAD % b"application/json" + b'{"data": [{"id": "tiny"}]}'


def campaign(work: Path, found: Found, options: Namespace) -> None:
    """Give each reader a file, a pipe or a server that never ends."""
    _lose_patience()
    source = rig.make_checkpoint(work / "source", 4, 1 << 40, **{**rig.TINY, "vocab_size": 32000})
    pid = rig.fork(rig.mixchat("download", str(source), "--name", "tiny"), work / "out")
    assert rig.wait(pid) == 0, (work / "out").read_text()
    rows: dict[str, object] = {}
    try:
        for label, arguments, variables in (*_here(work), *_served(work)):

            def run(arguments: tuple[str, ...] = arguments, given: Any = variables) -> object:
                os.environ.update(given)
                os.dup2(os.open(ZERO if "-" in arguments else os.devnull, os.O_RDONLY), 0)
                return rig.mixchat(*arguments)()

            began = time.monotonic()
            code = judged(run, work / "out", label, found)
            found.counts[f"exit code {code}"] += 1
            rows[label] = f"exit code {code}, {time.monotonic() - began:4.1f} s"
            if code == 0:
                found.failures.append(f"{label}: taken")
    finally:
        for server in SERVERS:
            os.kill(server, signal.SIGKILL)
    rig.table("exit code and time", rows)


def _here(work: Path) -> Iterator[tuple[str, tuple[str, ...], dict[str, str]]]:
    """Yield what is read, the command that reads it, and the variables of its environment."""
    run = ("run", "-m", "tiny")
    yield "lines of a pipe", (*run, "--jsonl", "-"), {}
    yield "lines of a file", (*run, "--jsonl", ZERO), {}
    yield "a prompt from a pipe", (*run, "-"), {}
    yield "a file in a prompt", (*run, "-f", ZERO, "Hi"), {}
    yield "a system prompt", (*run, "--system-file", ZERO, "Hi"), {}
    yield "a schema", (*run, "--schema", ZERO, "Hi"), {}
    yield "a grammar", (*run, "--grammar", ZERO, "Hi"), {}
    yield "a cache of a prompt", (*run, "--prompt-cache", ZERO, "Hi"), {}
    yield "a worker's key", (*run, "--worker", "127.0.0.1", "--key-file", ZERO, "Hi"), {}
    yield "settings", (*run, "Hi"), {"MIXCHAT_CONFIG": ZERO}
    sparse = _sparse(work / "sparse", b"")
    for name, arguments in (
        ("answers", (*run, "--jsonl", os.devnull, "--resume-from", sparse)),
        ("a worker's key in a file", (*run, "--worker", "127.0.0.1", "--key-file", sparse, "Hi")),
    ):
        yield name, arguments, {}
    chats = Path(os.environ["MIXCHAT_HOME"]) / "chats"
    chats.mkdir(exist_ok=True)
    _sparse(chats / "chats.db", b"{")
    yield "a saved chat", ("run", "--resume", "20260101-0000-aaa", "Hi"), {}
    for name in ("config.json", "tokenizer.model"):
        model = work / name.partition(".")[0]
        model.mkdir()
        for path in (work / "source").iterdir():
            (model / path.name).symlink_to(path)
        (model / name).unlink()
        _sparse(model / name, b"{")
        yield f"a checkpoint's {name}", ("download", str(model)), {}


def _sparse(path: Path, beginning: bytes) -> str:
    path.write_bytes(beginning)
    os.truncate(path, SPARSE)
    return str(path)


def _served(work: Path) -> Iterator[tuple[str, tuple[str, ...], dict[str, str]]]:
    """Yield the same for answers of a server and of a hub."""
    stream = HEAD % b"text/event-stream"
    piece = b'data: {"choices": [{"delta": {"content": "%s"}}]}\n\n' % (b"x" * 60_000)
    for name, answer, body in (
        ("a list of models", HEAD % b"application/json" + b'{"data": [', b" "),
        ("an answer without an end", stream, piece),
        ("an event without an end", stream, b"data: x"),
        ("an event of empty lines", stream, b"data:\n"),
        ("a header without an end", b"HTTP/1.1 200 OK\r\nA: ", b"x"),
        ("headers without an end", b"HTTP/1.1 200 OK\r\n", b"A: x\r\n"),
        ("a refusal without an end", b"HTTP/1.1 400 Bad\r\n\r\n", b"x"),
        ("a redirect without an end", REDIRECT, b"x"),
        ("informational responses", b"", CONTINUE),
        ("informational responses before an answer", _LISTED, CONTINUE),
        ("comments", stream, b": ping\n\n"),
        ("comments that tell of a queue", stream, b": waiting\n\n"),
        ("comments on a prompt", stream, b": read 1 of 999999999 tokens\n\n"),
        ("empty pieces", stream, _delta("")),
        ("pieces without a delta", stream, b'data: {"choices": []}\n\n'),
        ("events without data", stream, b"id: 5\n\n"),
        ("empty lines", stream, b"\n"),
        ("extensions of chunks", CHUNKS % b"text/event-stream", EXTENSION),
    ):
        address = _server(answer, body * (65536 // len(body) + 1))
        yield f"{name} of a server", ("run", "--server", address, "--no-stream", "Hi"), {}
        lines = ("run", "--server", address, "-m", "tiny", "--jsonl", str(_line(work)))
        yield f"{name} of a server for lines", lines, {}
    for name, answer, body in (
        ("a list of models", HEAD % b"application/json", b" "),
        ("informational responses", b"", CONTINUE),
        ("informational responses before an answer", _LISTED, CONTINUE),
        ("a header", b"HTTP/1.1 200 OK\r\nA: ", b"x"),
        ("a refusal", REFUSAL, b" "),
        ("comments", stream, b": ping\n\n"),
        ("comments on a prompt", stream, b": read 1 of 9 tokens\n\n"),
        ("empty pieces", stream, _delta("")),
        ("half an event", stream, b"d"),
    ):
        address = _server(answer, body, pause=1)
        arguments = ("run", "--server", address, "--no-stream", "Hi")
        yield f"{name}, a piece a second, of a server", arguments, {}
    for name, answer, body in (
        ("a listing", HEAD % b"application/json", b"\0"),
        ("a refusal", b"HTTP/1.1 500 Error\r\n\r\n", b"\0"),
        ("informational responses", b"", CONTINUE),
        ("a redirect", REDIRECT, b"x"),
        ("a redirect in a circle", REDIRECT[:-2] + b"Content-Length: 0\r\n\r\n", b""),
        ("a bomb of gzip", COMPRESSED % b"application/json", gzip.compress(b" " * (1 << 26))),
        ("gzip of nothing", COMPRESSED % b"a/b" + gzip.compress(b"")[:10], EMPTY_BLOCK),
        ("extensions of chunks", CHUNKS % b"application/json", EXTENSION),
    ):
        body *= 65536 // max(1, len(body)) + 1
        endpoint = {"HF_ENDPOINT": f"http://{_server(answer, body)}"}
        yield f"{name} of a hub", ("download", rig.REPO), endpoint
    for name, answer, body in (
        ("a listing", HEAD % b"application/json", b" "),
        ("informational responses", b"", CONTINUE),
        ("a header", b"HTTP/1.1 200 OK\r\nA: ", b"x"),
        ("a redirect", REDIRECT, b"x"),
    ):
        endpoint = {"HF_ENDPOINT": f"http://{_server(answer, body, pause=1)}"}
        yield f"{name}, a piece a second, of a hub", ("download", rig.REPO), endpoint


def _lose_patience() -> None:
    """Let children wait for seconds."""
    from mixchat.install.source import hub_request, transfer
    from mixchat.serving.client import patience

    patience._SMALL_S = patience._ANSWER_S = patience._QUEUE_S = 5.0
    patience._BYTE_S = 0.0
    hub_request._PACE_S = 5.0
    transfer._WAITS_S = (0.0,) * 5  # type: ignore[assignment]


def _delta(text: str) -> bytes:
    piece = {"choices": [{"index": 0, "delta": {"content": text}}]}
    return f"data: {json.dumps(piece)}\n\n".encode()


def _line(work: Path) -> Path:
    path = work / "line.jsonl"
    path.write_text('{"prompt": "Hi"}\n')
    return path


def _server(answer: bytes, body: bytes, pause: float = 0.0) -> str:
    """Start a process that answers, and never ends its answer; return its address.

    It has a list of models if its answer is a stream of events, or `_LISTED`.
    """
    has_models = b"event-stream" in answer or answer is _LISTED
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                if connection.recv(65536).startswith(b"GET") and has_models:
                    connection.sendall(MODELS)
                    continue
                connection.sendall(answer)
                while True:
                    connection.sendall(body)
                    time.sleep(pause)
                    if not body:
                        break

    SERVERS.append(rig.fork(serve))
    return "127.0.0.1:{}".format(*listener.getsockname()[1:])
