"""Connections of strangers to a worker: another key, garbage, half a handshake, too much, silence.

None of them may get more than the greeting, which everybody gets.
"""

from __future__ import annotations

import random
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable

from mixchat.experts.workers.handshake import MAGIC

GREETING = len(MAGIC) + 32  # bytes: the magic and a nonce
KINDS: dict[str, Callable[[random.Random], bytes]] = {
    "another key": lambda _: secrets.token_bytes(64),
    "garbage": lambda chance: chance.randbytes(chance.randrange(1, 5000)),
    "half a handshake": lambda _: secrets.token_bytes(32),
    "too much": lambda _: secrets.token_bytes(1 << 20),
    "HTTP": lambda _: b"GET / HTTP/1.1\r\nHost: worker\r\n\r\n",
    "silence": lambda _: b"",
}
_PATIENCE = 20.0  # seconds
_AT_ONCE = 20


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
            elif received > GREETING:
                outcomes[f"{kind}: served"] += 1

    threads = [threading.Thread(target=come) for _ in range(_AT_ONCE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes, longest[0]


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
