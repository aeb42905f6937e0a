"""A line for each request: method, path, status, tokens and seconds, and no text of a prompt."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import Full, Queue

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mixchat.base.progress import Note

_MAX_METHOD, _MAX_PATH = 16, 80  # characters, which a client chose
_UNKNOWN = "-"
_MAX_WAITING = 1000  # lines that a reader has not taken yet
_END_TIMEOUT_S = 1.0  # for the last lines
# In a scope's state: the tokens of prompts and answers so far, and the status of a connection that
# was refused while its request was answered.
TOKENS, REFUSED = "tokens", "refused"
CountTokens = Callable[[], tuple[int, int]]


@contextmanager
def written_aside(fd: int) -> Iterator[Note]:
    """Yield a function that writes a line to `fd` in a thread, and never waits for its reader.

    Lines that find no room are dropped, and counted in a line as soon as one can be written. A
    reader that stopped held the server.
    """
    lines: Queue[str | None] = Queue(_MAX_WAITING)
    dropped = 0

    def log(line: str) -> None:
        nonlocal dropped
        try:
            lines.put_nowait(line)
        except Full:
            dropped += 1

    def write_all() -> None:
        told = 0
        with suppress(OSError):  # the reader has gone
            # Not by sys.stderr, whose lock a blocked write would hold when Python ends.
            while (line := lines.get()) is not None:
                os.write(fd, f"{line}\n".encode())
                if (count := dropped - told) > 0:
                    told += count
                    os.write(fd, f"{_stamped([f'({count} lines dropped)'])}\n".encode())

    thread = threading.Thread(target=write_all, name="request log", daemon=True)
    thread.start()
    try:
        yield log
    finally:
        with suppress(Full):
            lines.put(None, timeout=_END_TIMEOUT_S)
            thread.join(_END_TIMEOUT_S)


def logged(app: ASGIApp, log: Note) -> ASGIApp:
    """Return `app`, which writes a line when a request ends, however it ends."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        started = time.monotonic()
        status: int | None = None
        is_whole = False

        async def send_and_look(message: Message) -> None:
            nonlocal status, is_whole
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)
            if message["type"] == "http.response.body":
                is_whole = not message.get("more_body", False)

        try:
            await app(scope, receive, send_and_look)
        finally:
            state = scope.get("state", {})
            # Without the query, which may hold a key.
            path = scope.get("raw_path", b"").decode("latin-1")
            line = [_short(scope["method"], _MAX_METHOD), _short(path, _MAX_PATH)]
            line.append(str(state.get(REFUSED, status or _UNKNOWN)))
            if count := state.get(TOKENS):
                line.append("{}+{} tokens".format(*count()))
            line.append(f"{time.monotonic() - started:.2f} s")
            log(_stamped(line if is_whole else [*line, "(broken off)"]))

    return answer


def refusal_line(status: int) -> str:
    """Return the line for bytes that were refused before they were a request."""
    return _stamped([_UNKNOWN, _UNKNOWN, str(status), "(no request)"])


def _stamped(words: list[str]) -> str:
    return " ".join([time.strftime("%Y-%m-%d %H:%M:%S"), *words])


def _short(text: str, longest: int) -> str:
    """Return a client's word as ASCII without blanks, so that it cannot forge a line or a word."""
    shown = ascii(text[:longest])[1:-1].replace(" ", "%20")
    return f"{shown}..." if len(text) > longest else shown or _UNKNOWN
