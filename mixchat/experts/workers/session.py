"""The worker's side of one chat: it loads experts, and computes what is asked for.

D = hidden_size, n = rows of a request.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from mixchat.base import interrupts
from mixchat.experts.cache import ExpertKey
from mixchat.experts.workers import messages
from mixchat.experts.workers.connection import (
    SILENCE_S,
    BadMessageError,
    ConnectionLostError,
    receive_rows,
    send_rows,
)
from mixchat.experts.workers.listener import Listener, Message, Peer
from mixchat.experts.workers.messages import Hello, Kind, Request

IDLE_S = 0.25  # between two looks at the memory, if nothing is asked


class HostedExperts(Protocol):
    """The experts of a worker: what `Session` needs of them."""

    @property
    def num_layers(self) -> int:
        """Return how many layers the model has."""

    @property
    def num_experts(self) -> int:
        """Return how many experts a layer has."""

    @property
    def slots(self) -> int:
        """Return how many experts can be held."""

    def follow_memory(self) -> None:
        """Free experts if other programs need the memory. Often called while nothing is asked.

        Then there are fewer `slots`. When there is memory again, they become more.
        """

    def hold(self, keys: Sequence[ExpertKey]) -> None:
        """Let these experts be the ones to hold, as far as there are slots; load none yet."""

    def load_next(self) -> bool:
        """Load the first of the experts to hold that is missing; return False if none is."""

    def compute(
        self,
        layer: int,
        experts: Sequence[tuple[int, int]],
        x: torch.Tensor,
        shared_row: bool,
        check: Callable[[], None],
    ) -> torch.Tensor:
        """Return the outputs of experts, each (expert, rows), expert by expert: [n, D] on the CPU.

        x: [n, D] on the CPU; [1, D] with `shared_row`, for all experts. An expert that is not held
        is loaded first. `check` is called between two experts, and raises if nobody waits for the
        result any more.
        """


class Session:
    """One chat, from its first request to the end of its connection.

    `answer_other` gets the messages of other peers, which come between its own.
    """

    def __init__(
        self,
        listener: Listener,
        peer: Peer,
        experts: HostedExperts,
        hello: Hello,
        answer_other: Callable[[Message], None],
    ) -> None:
        self.requests = 0
        self._listener, self._peer, self._experts = listener, peer, experts
        self._answer_other = answer_other
        self._hidden_size, self._dtype = hello.hidden_size, getattr(torch, hello.dtype)
        self._room = experts.slots  # that the chat side knows of
        self._loading = False

    def run(self) -> None:
        """Serve until the chat side is gone: then `ConnectionLostError` is raised.

        An error of the experts is raised, too.
        """
        while True:
            message = self._next()
            if messages.kind_of(message) == Kind.HOLD:
                self._hold(messages.unpack_keys(message[1:]))
            else:
                messages.expect(Kind.COMPUTE, message)
                self._serve(*messages.unpack_request(message))

    def _next(self) -> bytes:
        """Return the next message. Until there is one, load experts, one by one, or free them."""
        while (message := self._receive(0.0 if self._loading else IDLE_S)) is None:
            if self._loading:  # a request may come meanwhile
                self._loading = self._experts.load_next()
            else:
                self._experts.follow_memory()
        return message

    def _hold(self, keys: list[ExpertKey]) -> None:
        _require(len(keys) <= self._room)
        for layer, expert in keys:
            _require(layer < self._experts.num_layers)
            _require(expert < self._experts.num_experts)
        self._experts.hold(keys)
        self._loading = True

    def _serve(self, request: Request, piece: bytes) -> None:
        """Compute a request, whose rows begin with `piece`."""
        _require(request.layer < self._experts.num_layers)
        _require(all(expert < self._experts.num_experts for expert, _ in request.experts))
        x = torch.empty(request.rows_sent, self._hidden_size, dtype=self._dtype)
        receive_rows(x, piece, self._receive_piece)
        begun = time.perf_counter()
        y = self._experts.compute(
            request.layer, request.experts, x, request.shared_row, self._check
        )
        seconds = time.perf_counter() - begun
        assert y.shape == (request.rows, self._hidden_size)
        assert y.dtype == self._dtype
        send_rows(self._send, messages.pack_done(seconds), y)
        self.requests += 1

    def _send(self, message: bytes) -> None:
        self._listener.send(self._peer, message)

    def _receive_piece(self) -> bytes:
        deadline = time.monotonic() + SILENCE_S
        while (piece := self._receive(IDLE_S)) is None:
            if time.monotonic() >= deadline:
                raise ConnectionLostError("its rows do not arrive")
        return piece

    def _check(self) -> None:
        """Raise if the chat side is gone, or speaks out of turn."""
        if self._receive(0.0) is not None:
            raise BadMessageError("it sent a message out of turn")

    def _receive(self, within: float) -> bytes | None:
        """Return the chat side's next message, if one comes in time."""
        interrupts.check()
        message = self._listener.receive(within)
        if message is not None and message.peer == self._peer:
            return message.data
        if not self._listener.has(self._peer):
            if message is not None:
                self._listener.keep(message)  # of the next chat
            raise ConnectionLostError("it closed the connection")
        if message is not None:
            self._answer_other(message)
        return None


def _require(condition: bool) -> None:
    if not condition:
        raise BadMessageError("it asked for what the model does not have")
