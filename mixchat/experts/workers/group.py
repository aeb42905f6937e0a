"""The group of two members over which rows of hidden states travel.

torch.distributed has no authentication, so the members meet over the connection, whose ends have
proved that they know the key; and the first that each sends over the group is a proof that it is
the one of the connection. There is no store that listens, and no default group.
"""

from __future__ import annotations

import hmac
import json
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist

from mixchat import interrupts
from mixchat.experts.workers.connection import Connection, ConnectionLostError
from mixchat.experts.workers.handshake import Proofs
from mixchat.experts.workers.messages import Kind

CHAT, WORKER = 0, 1  # the ranks

# An operation of the group cannot be interrupted: many rows travel in pieces, each with a deadline
# that ends the wait for a peer that hangs. To meet takes milliseconds, or as long.
_DEADLINE = 5.0  # seconds
_PIECE = 4 << 20  # bytes

ROW, ROWS, RESULT = 1, 2, 3  # the tags of what travels
_PROOF = 0


class Transfer:
    """Rows on their way: they must be kept, and waited for, until they have arrived."""

    def __init__(self, rows: torch.Tensor, works: list[Any]) -> None:
        self.rows = rows
        self._works = works

    def wait(self, check: Callable[[], None] = interrupts.check) -> torch.Tensor:
        """Return the rows when they have arrived. Raises `ConnectionLostError`.

        `check` is called between two pieces, and may raise.
        """
        while self._works:
            try:
                self._works[0].wait(timedelta(seconds=_DEADLINE))
            except RuntimeError as error:
                raise _lost(error) from None
            del self._works[0]  # a second wait for the same would never end
            if self._works:
                check()
        return self.rows


class Group:
    """Sends and receives rows, as they are in memory: both ends know their shape and type."""

    def __init__(self, connection: Connection, rank: int, proofs: Proofs) -> None:
        """Meet the other member. Raises `ConnectionLostError`."""
        self._other = 1 - rank
        try:
            self._group: Any = dist.ProcessGroupGloo(
                _Store(connection), rank, 2, _options(connection.local_host)
            )
        except (RuntimeError, ValueError) as error:
            raise _lost(error) from None
        if rank == CHAT:
            self._prove(proofs.chat, proofs.worker)
        else:
            self._prove(proofs.worker, proofs.chat)

    def send(self, rows: torch.Tensor, tag: int) -> Transfer:
        """Begin to send rows, contiguous and on the CPU. Raises `ConnectionLostError`."""
        return self._begin(self._group.send, rows, tag)

    def receive(self, rows: torch.Tensor, tag: int) -> Transfer:
        """Begin to receive into `rows`, contiguous and on the CPU. Raises `ConnectionLostError`.

        What is received before it is sent arrives sooner: a sender waits for its receiver.
        """
        return self._begin(self._group.recv, rows, tag)

    def _begin(self, operation: Any, rows: torch.Tensor, tag: int) -> Transfer:
        assert rows.is_contiguous()
        assert rows.device.type == "cpu"
        try:
            return Transfer(rows, [operation([part], self._other, tag) for part in _pieces(rows)])
        except RuntimeError as error:
            raise _lost(error) from None

    def _prove(self, mine: bytes, others: bytes) -> None:
        received = self.receive(torch.zeros(len(others), dtype=torch.uint8), _PROOF)
        sent = self.send(torch.frombuffer(bytearray(mine), dtype=torch.uint8), _PROOF)
        if not hmac.compare_digest(bytes(received.wait().tolist()), others):
            raise ConnectionLostError("a stranger is in the group")
        sent.wait()


class _Store(dist.Store):  # type: ignore[misc, name-defined]
    """The messages by which the members meet, sent over their connection."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = connection
        self._values: dict[str, bytes] = {}
        self._deadline = time.monotonic() + _DEADLINE

    def set(self, key: str, value: Any) -> None:
        self._values[key] = bytes(value)
        frame = json.dumps([key, self._values[key].hex()]).encode()
        self._connection.send(Kind.STORE, frame)

    def get(self, key: str) -> bytes:
        while key not in self._values:
            self._receive()
        return self._values[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        for key in keys:
            self.get(key)

    def _receive(self) -> None:
        frame = self._connection.receive(self._deadline)
        try:
            if frame.kind != Kind.STORE:
                raise ValueError
            key, value = json.loads(frame.payload)
            self._values.setdefault(str(key), bytes.fromhex(value))
        except (ValueError, TypeError, RecursionError):
            raise ConnectionLostError("it sent a message that makes no sense") from None


def _pieces(rows: torch.Tensor) -> Sequence[torch.Tensor]:
    if rows.nbytes <= _PIECE:
        return (rows,)
    return torch.split(rows.view(-1), _PIECE // rows.element_size())


def _options(host: str) -> Any:
    """Return options that bind the group to the interface that reaches the other member."""
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=host)]
    options._timeout = timedelta(seconds=_DEADLINE)
    options._threads = 1
    return options


def _lost(error: Exception) -> ConnectionLostError:
    # The library's messages name lines of its source: nothing for a person.
    late = "timed out" in str(error).lower()
    return ConnectionLostError("its rows do not arrive" if late else "its connection has failed")
