"""Accepts the connections of clients, no more than the process has descriptors for.

asyncio accepts until no descriptor is left. Then a connection can be neither accepted nor looked
at, and each attempt prints a traceback.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sized

from mixchat.base import system

_OPEN_FILES = 8192  # the usual limit is 1,024
_HELD_BACK = 256  # files of the process itself: another model is checked, sandboxes for forms
_LEAST = 8  # connections
_AT_ONCE = 64  # connections that are accepted before others get their turn
_FULL_S = 0.05  # between two looks for room


class Acceptor:
    """Accepts connections in the event loop that runs, until `close`.

    `make_room` is asked to close some connections when there are `limit`.
    """

    def __init__(
        self,
        bound: socket.socket,
        protocol: Callable[[], asyncio.BaseProtocol],
        opened: Sized,
        make_room: Callable[[], object],
        limit: int,
    ) -> None:
        self._bound = bound
        self._protocol = protocol
        self._opened = opened
        self._make_room = make_room
        self._limit = limit
        self._beginning: set[asyncio.Task[object]] = set()
        self._task = asyncio.ensure_future(self._accept())

    def close(self) -> None:
        self._task.cancel()

    async def wait_closed(self) -> None:
        await asyncio.wait([self._task])

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        number = 0
        while True:
            while len(self._opened) + len(self._beginning) >= self._limit:
                await self._wait_for_room()
            try:
                accepted, _ = await loop.sock_accept(self._bound)
            except OSError:  # the client is gone already, or no descriptor is left
                await self._wait_for_room()
                continue
            task = loop.create_task(self._begin(accepted))
            self._beginning.add(task)
            task.add_done_callback(self._beginning.discard)
            number += 1
            if number % _AT_ONCE == 0:
                await asyncio.sleep(0)

    async def _wait_for_room(self) -> None:
        self._make_room()
        await asyncio.sleep(_FULL_S)

    async def _begin(self, accepted: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(self._protocol, accepted)
        except OSError:  # the client is gone
            accepted.close()


def most_connections() -> int:
    """Return how many connections there may be, with files left for everything else."""
    system.allow_open_files(_OPEN_FILES)
    files = system.open_files_left()
    if files is None:
        return _OPEN_FILES
    return max(_LEAST, files - min(_HELD_BACK, files * 2 // 3))
