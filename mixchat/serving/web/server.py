"""uvicorn in a thread, from the first request to an orderly end.

uvicorn itself waits for ever for a request and for a slow reader. Outside the main thread it leaves
mixchat's signal handlers in place.
"""

from __future__ import annotations

import asyncio
import math
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from typing import Any, cast

import h11
from starlette.types import ASGIApp
from uvicorn import Config, Server
from uvicorn.protocols.http.h11_impl import H11Protocol

from mixchat.base import interrupts, machine
from mixchat.base.progress import Note, in_background
from mixchat.base.quantities import format_count, format_time
from mixchat.serving.requests.errors import RequestError
from mixchat.serving.requests.fields import to_json
from mixchat.serving.web.acceptor import Acceptor, most_connections
from mixchat.serving.web.request_log import REFUSED, refusal_line
from mixchat.serving.web.served_models import ServedModels

_CLIENT_TIMEOUT_S = 30.0  # for a whole request, and for a client to read
_MAX_WAITING = 256  # connections without a whole request yet
_WAITING_GRACE_S = 1.0
_FULL_GRACE_S = 0.2  # of a connection without a byte, if there is no room for others
_ROOM = 32  # connections that are closed at once to make room
_CLOSE_TIMEOUT_S = 0.5  # for cancelled answers to end, until the service is left to itself
_FLUSH_TIMEOUT_S = 1  # for what is computed to be sent
_SIGNAL_WAIT_S = 0.5  # between looks at signals of other threads
_MAX_CHUNKS = 10_000  # of a body; each takes the event loop 5 us, even with one byte
_PROBE_S, _PROBE_REPLY_S = 0.3, 0.1  # between probes of a client, and until its refusal is here


def _refusal(status: str, message: str, code: str) -> bytes:
    body = to_json(RequestError(message, code=code).body)
    head = f"HTTP/1.1 {status}\r\nConnection: close\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


_TOO_SLOW = _refusal(
    "408 Request Timeout", "the request did not come to its end in time", "request_timeout"
)
_NOT_HTTP = _refusal("400 Bad Request", "this is not a valid request of HTTP", "invalid_http")
_TOO_MANY_CHUNKS = _refusal(
    "413 Content Too Large",
    f"the body has more than {_MAX_CHUNKS} chunks: send larger ones",
    "request_too_large",
)


class WaitingConnections:
    """The connections without a whole request yet, oldest first.

    Above `limit`, those are closed that have waited for `grace` seconds.
    """

    def __init__(self, limit: int = _MAX_WAITING, grace: float = _WAITING_GRACE_S) -> None:
        self._limit = limit
        self._grace = grace
        self._since: dict[ClientConnection, float] = {}
        self._look: asyncio.TimerHandle | None = None  # for connections that are too old

    def add(self, connection: ClientConnection) -> None:
        """Add a connection, and close the oldest of too many, as soon as they are old enough."""
        self._since[connection] = connection.loop.time()
        if self._look is None:
            self._close_oldest(connection.loop)

    def remove(self, connection: ClientConnection) -> None:
        self._since.pop(connection, None)

    def make_room(self) -> None:
        """Close some of the oldest, first those that have sent nothing yet."""
        silent = [connection for connection in self._since if not connection.has_begun]
        grace = _FULL_GRACE_S if silent else self._grace
        for connection in (silent or [*self._since])[:_ROOM]:
            if connection.loop.time() - self._since[connection] < grace:
                return
            connection.give_up()

    def _close_oldest(self, loop: asyncio.AbstractEventLoop) -> None:
        self._look = None
        while len(self._since) > self._limit:
            oldest, since = next(iter(self._since.items()))
            if (wait := since + self._grace - loop.time()) > 0:
                self._look = loop.call_later(wait, self._close_oldest, loop)
                return
            oldest.give_up()


class _ChunkLimit(h11.Connection):
    """A connection's state of HTTP, for bodies of a bounded number of chunks."""

    chunks = 0  # of the request's body so far

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self.chunks = 0
        elif isinstance(event, h11.Data) and event.chunk_start:
            self.chunks += 1
            if self.chunks > _MAX_CHUNKS:
                raise h11.RemoteProtocolError("too many chunks")
        return event


class ClientConnection(H11Protocol):
    """A client's connection, for many requests in turn."""

    def __init__(
        self,
        *args: Any,
        waiting: WaitingConnections,
        timeout: float,
        log: Note | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.conn: _ChunkLimit = _ChunkLimit(h11.SERVER)
        self._waiting = waiting
        self._timeout = timeout
        self._log = log
        # "deadline" of a request, "stall" of a client that takes nothing, "probe" of one that sends
        # no more.
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self.has_begun = False  # whether a part of the request has come
        self._half_closed = False  # the client sends no more

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._waiting.remove(self)
        for name in [*self._timers]:
            self._stop(name)
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Return whether the connection stays open, for the answer to a request.

        Only a client of HTTP/1.1 gets it. A client that has left looks the same until it is sent
        something, and others know no interim responses that could be sent.
        """
        cycle = self.cycle
        if cycle is None or cycle.response_complete or cycle.more_body or cycle.response_started:
            return False
        if self.scope["http_version"] != "1.1":
            return False
        self._half_closed = True
        self._start("probe", _PROBE_S, self._send_probe)
        return True

    def _send_probe(self) -> None:
        """Send an interim response, which a client that has left refuses."""
        if self.cycle.response_started or self.transport.is_closing():
            return
        interim = h11.InformationalResponse(status_code=102, headers=[], reason=b"Processing")
        self.transport.write(self.conn.send(interim))
        self._start("probe", _PROBE_REPLY_S, self._look_for_refusal)

    def _look_for_refusal(self) -> None:
        # The system of a client that has left answers the probe with a reset.
        sock = self.transport.get_extra_info("socket")
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()
        else:
            self._start("probe", _PROBE_S, self._send_probe)

    def data_received(self, data: bytes) -> None:
        self.has_begun = True
        super().data_received(data)
        if self.cycle and not self.cycle.response_complete and not self.cycle.more_body:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        cycle = self.cycle
        super().on_response_complete()  # which may begin with a request that came meanwhile
        waits = self.cycle is cycle or self.cycle.more_body
        if waits and self._half_closed:
            self.transport.close()
        elif waits and not self.transport.is_closing():
            self._wait()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start("stall", self._timeout, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop("stall")

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP, in JSON."""
        cycle = self.cycle
        if cycle is None or cycle.response_complete or not cycle.response_started:
            is_chunked = self.conn.chunks > _MAX_CHUNKS
            self._refuse(_TOO_MANY_CHUNKS if is_chunked else _NOT_HTTP)
        self.transport.close()

    def give_up(self) -> None:
        """Close the connection, and say so to a client that has begun a request."""
        self._stop_waiting()
        if self.has_begun and not (self.cycle and self.cycle.response_started):
            self._refuse(_TOO_SLOW)
        self.transport.close()

    def _refuse(self, refusal: bytes) -> None:
        self.transport.write(refusal)
        status = int(refusal.split()[1])
        if self.cycle is not None and not self.cycle.response_complete:
            self.scope["state"][REFUSED] = status  # the application logs the request
        elif self._log is not None:
            self._log(refusal_line(status))

    def _wait(self) -> None:
        self._stop_waiting()  # for the rest of a request that was answered early
        self.has_begun = False
        self._start("deadline", self._timeout, self.give_up)
        self._waiting.add(self)

    def _stop_waiting(self) -> None:
        self._waiting.remove(self)
        self._stop("deadline")

    def _start(self, name: str, seconds: float, call: Callable[[], object]) -> None:
        self._stop(name)
        self._timers[name] = self.loop.call_later(seconds, call)

    def _stop(self, name: str) -> None:
        if timer := self._timers.pop(name, None):
            timer.cancel()


class WebServer(Server):
    """Serves an application of ASGI in a thread, on a bound socket."""

    def __init__(
        self,
        app: ASGIApp,
        bound: socket.socket,
        *,
        started: Callable[[], object] = lambda: None,
        timeout: float = _CLIENT_TIMEOUT_S,
        waiting: WaitingConnections | None = None,
        log: Note | None = None,
    ) -> None:
        """Serve nothing yet. `started` is called in the event loop.

        Clients have `timeout` seconds to send, and to read. `log` gets a line for what is refused
        before it is a request.
        """
        waiting = waiting or WaitingConnections()
        protocol: Any = partial(ClientConnection, waiting=waiting, timeout=timeout, log=log)
        config = Config(
            app,
            http=protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",  # the application tells what goes wrong
            access_log=False,
            server_header=False,
            timeout_keep_alive=math.ceil(timeout),
            timeout_graceful_shutdown=_FLUSH_TIMEOUT_S,
        )
        super().__init__(config)
        self._bound = bound
        self._started = started
        self._waiting = waiting
        self._is_ready = threading.Event()
        self._over: Future[None] | None = None

    def start(self) -> None:
        """Start, and wait until it serves. Raises `OSError` if it cannot."""
        machine.survive_without_descriptors()
        self._over = in_background(self.run, [self._bound])
        self._over.add_done_callback(lambda over: self._is_ready.set())
        self._is_ready.wait()
        if self._over.done():
            self._over.result()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])  # uvicorn would let asyncio accept
        config = self.config
        state = self.server_state
        limit = most_connections()
        opened = state.connections
        protocol_type = cast("Any", config.http_protocol_class)
        protocol = partial(protocol_type, config, state, self.lifespan.state)
        for bound in sockets or []:
            bound.listen(config.backlog)
            bound.setblocking(False)
            acceptor: Any = Acceptor(bound, protocol, opened, self._waiting.make_room, limit)
            self.servers.append(acceptor)
        self._started()
        self._is_ready.set()

    def join(self) -> None:
        """Wait for the end. Raises what ended it."""
        assert self._over is not None
        self._wait(math.inf)
        self._over.result()

    @property
    def connections(self) -> int:
        return len(self.server_state.connections)

    def drain(self, seconds: float) -> None:
        """Close the port and idle connections, and end if the other requests are answered in time.

        A load balancer then asks another server, since this one refuses its connections.
        """
        self.config.timeout_graceful_shutdown = math.ceil(seconds) + _FLUSH_TIMEOUT_S
        self.should_exit = True
        self._wait(seconds)

    def stop(self) -> None:
        """Take no more connections, send what is computed, and end."""
        self.should_exit = True
        self._wait(_FLUSH_TIMEOUT_S + 0.5)

    def _wait(self, seconds: float) -> None:
        """Wait for the end. A signal that the system gave to another thread is handled here."""
        deadline = time.monotonic() + seconds
        while self._over is not None and not self._over.done():
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return
            wait([self._over], min(remaining, _SIGNAL_WAIT_S))


def serve_until_signal(
    server: WebServer,
    models: ServedModels,
    ready: Callable[[], object],
    note: Note,
    *,
    drain: float,
    saves: bool = False,
) -> None:
    """Serve until a signal, and raise its exception when all has ended.

    Running answers have `drain` seconds then, and none after a second Ctrl-C. The rest takes 2 s at
    most. If the models' end `saves` something, nothing but Ctrl-C cuts it off.
    """
    with interrupts.saving():
        server.start()
        ready()
        try:
            server.join()
        except BaseException as signal:
            stats = models.stats()
            if count := stats.running + stats.waiting:
                is_ctrl_c = isinstance(signal, KeyboardInterrupt)
                again = "; Ctrl-C ends them at once" if is_ctrl_c else ""
                answers = format_count(count, "answer")
                note(f"{answers} may end, for {format_time(drain)}{again}")
            raise
        finally:
            server.drain(drain)
            closing = in_background(models.close)
            wait([closing], None if saves else _CLOSE_TIMEOUT_S)
            server.stop()
