"""uvicorn in a thread, from the first request to an orderly end.

The main thread waits for a signal: mixchat's own handlers stay in place, since uvicorn installs its
own only in the main thread.
"""

from __future__ import annotations

import math
import resource
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import partial
from typing import Any

from starlette.types import ASGIApp
from uvicorn import Config, Server

from mixchat.base import interrupts
from mixchat.base.background import in_background
from mixchat.base.progress import Note
from mixchat.serving.service import Service
from mixchat.serving.web.connections import PATIENCE, Connection, Waiting

_PATIENCE = 7.0  # seconds for running answers to come to their end
_LATE = 0.5  # seconds more until the service is left behind
_FLUSH = 1  # seconds for what is computed to be sent
_FILES = 8192  # open files; the usual limit of 1,024 would bound the connections


class WebServer:
    """Serves an application of ASGI in a thread, on a socket that is bound."""

    def __init__(
        self,
        app: ASGIApp,
        bound: socket.socket,
        *,
        patience: float = PATIENCE,
        waiting: Waiting | None = None,
    ) -> None:
        """Serve nothing yet. `patience` and `waiting` are those of `Connection`."""
        protocol: Any = partial(Connection, waiting=waiting or Waiting(), patience=patience)
        self._server = _Server(
            Config(
                app,
                http=protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="critical",  # what goes wrong is told by the application
                access_log=False,
                server_header=False,
                timeout_keep_alive=math.ceil(patience),
                timeout_graceful_shutdown=_FLUSH,
            )
        )
        self._bound = bound
        self._over: Future[None] | None = None

    def start(self) -> None:
        """Start to serve, and return as soon as it does. Raises `OSError` where it cannot."""
        _allow_files()
        self._over = in_background(self._server.run, [self._bound])
        self._over.add_done_callback(lambda over: self._server.ready.set())
        self._server.ready.wait()
        if self._over.done():
            self._over.result()

    def join(self) -> None:
        """Wait until it has ended. Raises what ended it."""
        assert self._over is not None
        self._over.result()

    @property
    def connections(self) -> int:
        """Return how many connections are open."""
        return len(self._server.server_state.connections)

    def stop(self) -> None:
        """Take no more connections, send what is computed, and end."""
        self._server.should_exit = True
        if self._over is not None:
            wait([self._over], _FLUSH + 0.5)


class _Server(Server):
    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.ready = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self.ready.set()


def serve_until_signal(
    server: WebServer, service: Service, ready: Callable[[], object], note: Note
) -> None:
    """Serve until a signal comes, and raise its exception when all has ended, 10 s later at most.

    Meanwhile new requests are refused, and running answers have 7 s. After Ctrl-C, a second one
    ends them at once.
    """
    with interrupts.saving():
        server.start()
        ready()
        try:
            server.join()
        except BaseException as signal:
            stats = service.stats()
            if count := stats.running + stats.waiting:
                name = "answer" if count == 1 else "answers"
                again = (
                    "; Ctrl-C ends them at once" if isinstance(signal, KeyboardInterrupt) else ""
                )
                note(f"{count} {name} may end, for {_PATIENCE:.0f} s{again}")
            raise
        finally:
            wait([in_background(service.close, _PATIENCE)], _PATIENCE + _LATE)
            server.stop()


def _allow_files() -> None:
    """Raise the limit on open files as far as it may be raised."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
