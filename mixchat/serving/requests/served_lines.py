"""A file of prompts that a server with OpenAI's API answers, several requests at once."""

from __future__ import annotations

import queue
import time
from collections.abc import Mapping
from typing import Any

from mixchat.base.background import in_background
from mixchat.base.context import UNKNOWN
from mixchat.serving.client.server_backend import ServerBackend
from mixchat.serving.client.server_client import ServerClient
from mixchat.serving.client.server_json import BusyError, RefusedError, ServedModel
from mixchat.serving.requests.failures import RequestError
from mixchat.serving.requests.lines import Begin, Line, LineDefaults, request_of
from mixchat.serving.service import Done

_BUSY_TIMEOUT_S = 600.0


def answered_by(
    client: ServerClient, model: ServedModel, given: LineDefaults, at_once: int
) -> Begin:
    """Return what lets a server answer lines, at most `at_once` at a time."""
    context = ServerBackend(client, model).context or UNKNOWN
    waiting: queue.SimpleQueue[tuple[Line, Mapping[str, Any]]] = queue.SimpleQueue()

    def begin(line: Line, text: bytes) -> None:
        body = request_of(line, text, given, context)
        line.seed = body.get("seed")
        waiting.put((line, {"model": model.name, **body}))

    def work() -> None:
        while True:
            line, body = waiting.get()
            try:
                line.end(_answer(line, ServerBackend(client, model), body))
            except Exception as error:
                line.end(error)

    for _ in range(at_once):
        in_background(work)
    return begin


def _answer(line: Line, backend: ServerBackend, body: Mapping[str, Any]) -> Done:
    """Ask the server, again if it is busy. Raises `RequestError` if the line is at fault."""
    deadline = time.monotonic() + _BUSY_TIMEOUT_S
    while True:
        try:
            reply = backend.send(body)
        except RefusedError as error:
            raise RequestError(str(error)) from None
        except BusyError as error:
            if time.monotonic() + error.seconds > deadline:
                raise
            time.sleep(error.seconds)
        else:
            break
    try:
        line.text = "".join(reply.texts())
    finally:
        reply.close()
    stats = backend.stats
    return Done(reply.reason, stats.prompt_tokens, stats.reused_tokens, stats.generated_tokens)
