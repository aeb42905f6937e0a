"""A line for each request: method, path, status, tokens and seconds, and no text of a prompt."""

from __future__ import annotations

import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mixchat.base.progress import Note

_MAX_METHOD, _MAX_PATH = 16, 80  # characters, which a client chose
_UNKNOWN = "-"
# In a scope's state: the tokens of prompts and answers so far, and the status of a connection that
# was refused while its request was answered.
TOKENS, REFUSED = "tokens", "refused"
CountTokens = Callable[[], tuple[int, int]]


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
