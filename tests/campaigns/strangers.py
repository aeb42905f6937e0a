"""Connections of strangers to a worker: another key, garbage, half a handshake, too much, silence.

None of them may get more than libzmq's greeting, which everybody gets.
"""

import random
import secrets
import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

# See ZMTP 3.1 and CURVE: a signature, the version, the mechanism; and a chat side's first command.
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"CURVE".ljust(20, b"\0") + bytes(32)
HELLO = b"\x04\xc8\x05HELLO\x01\x00" + bytes(72)
KINDS: dict[str, Callable[[random.Random], bytes]] = {
    "another key": lambda _: GREETING + HELLO + secrets.token_bytes(120),
    "garbage": lambda chance: chance.randbytes(chance.randrange(1, 5000)),
    "garbage after the greeting": lambda chance: GREETING + chance.randbytes(300),
    "half a handshake": lambda chance: (GREETING + HELLO)[: chance.randrange(1, 140)],
    "too much": lambda _: GREETING + b"\x06" + bytes(8) + secrets.token_bytes(1 << 20),
    "HTTP": lambda _: b"GET / HTTP/1.1\r\nHost: worker\r\n\r\n",
    "silence": lambda _: b"",
}
_PATIENCE = 20.0  # seconds
_AT_ONCE = 100


def visit(target: tuple[str, int], count: int, seed: int) -> tuple[Counter[str], float]:
    """Let so many strangers come, some at once.

    Return how many of each kind came, and of each kind "served" or "kept", if there were any; and
    the seconds that one was kept at most.
    """
    outcomes: Counter[str] = Counter()
    longest = [0.0]
    numbers = iter(range(count))

    def come() -> None:
        for number in numbers:
            chance = random.Random(f"{seed} {number}")
            kind = chance.choice(list(KINDS))
            began = time.monotonic()
            received = _visit_once(target, KINDS[kind](chance))
            longest[0] = max(longest[0], time.monotonic() - began)
            outcomes[kind] += 1
            if received is None:
                outcomes[f"{kind}: kept"] += 1
            elif received > len(GREETING):
                outcomes[f"{kind}: served"] += 1

    threads = [threading.Thread(target=come) for _ in range(_AT_ONCE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes, longest[0]


def crowd(target: tuple[str, int], count: int, seconds: float) -> None:
    """Let so many strangers come at once and say nothing, again and again for so long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with ExitStack() as opened:
            for _ in range(count):
                with suppress(OSError):
                    opened.enter_context(socket.create_connection(target, 0.5))
            time.sleep(1)


@dataclass(frozen=True)
class Crowd:
    """Connections that are all there at once, send `said`, and wait for an end.

    With `comes_again` each is made anew when it was closed.
    """

    said: bytes = b""
    comes_again: bool = True

    def visit(self, target: tuple[str, int], count: int, over: threading.Event) -> int:
        """Visit a port until it is over. Return how many connections were made."""
        selector, made = selectors.DefaultSelector(), 0
        for _ in range(count):
            self._connect(target, selector)
            made += 1
        while not over.is_set():
            for key, _ in selector.select(0.2):
                connection: Any = key.fileobj
                if key.events == selectors.EVENT_WRITE:
                    with suppress(OSError):
                        connection.send(self.said)
                    selector.modify(connection, selectors.EVENT_READ)
                elif not _received(connection):
                    selector.unregister(connection)
                    connection.close()
                    if self.comes_again:
                        self._connect(target, selector)
                        made += 1
        for key in [*selector.get_map().values()]:
            key.fileobj.close()  # type: ignore[union-attr]
        selector.close()
        return made

    def _connect(self, target: tuple[str, int], selector: selectors.BaseSelector) -> None:
        connection = socket.socket()
        connection.setblocking(False)
        with suppress(BlockingIOError):
            connection.connect(target)
        event = selectors.EVENT_WRITE if self.said else selectors.EVENT_READ
        selector.register(connection, event)


def _received(connection: socket.socket) -> bytes:
    try:
        return connection.recv(4096)
    except OSError:
        return b""


def _visit_once(target: tuple[str, int], said: bytes) -> int | None:
    """Say that and read to the end; return the bytes received, None where no end came."""
    received = 0
    try:
        with socket.create_connection(target, _PATIENCE) as connection:
            connection.sendall(said)
            while data := connection.recv(4096):
                received += len(data)
    except TimeoutError:
        return None
    except OSError:  # reset: it was sent away
        pass
    return received
