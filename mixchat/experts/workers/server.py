"""A worker, which serves one chat at a time.

D = hidden_size, n = rows of a request.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Protocol

import torch

from mixchat import __version__
from mixchat.base import interrupts
from mixchat.base.errors import short_message
from mixchat.experts.cache import ExpertKey
from mixchat.experts.workers import messages, sockets
from mixchat.experts.workers.listener import Listener, Peer, PeerMessage

_POLL_S = 0.25  # between two looks at the memory, if nothing is asked
_MIN_SLOTS = 2


class WorkerModel(Protocol):
    """The installed model that a worker serves, and its experts."""

    identity: str  # of its bytes, hexadecimal
    name: str  # for people
    num_layers: int
    num_experts: int  # of a layer
    hidden_size: int

    @property
    def slots(self) -> int:
        """Return how many experts can be held."""

    def begin(self, hello: messages.Hello) -> str:
        """Prepare for a chat, and return `LinearSpec.arithmetic`. Raises `MixchatError`."""

    def follow_memory(self) -> None:
        """Free experts if other programs need the memory, or allow more `slots` again."""

    def hold(self, keys: Sequence[ExpertKey]) -> None:
        """Choose the experts to hold, as far as there are slots. Load none yet."""

    def load_next(self) -> bool:
        """Load the first chosen expert that is missing. Return False if none is."""

    def compute(
        self,
        layer: int,
        experts: Sequence[tuple[int, int]],
        x: torch.Tensor,
        shared_row: bool,
        check: Callable[[], None],
    ) -> torch.Tensor:
        """Return the outputs [n, D] of experts, each (expert, rows), on the CPU.

        x: [n, D] on the CPU, or [1, D] with `shared_row`. `check` is called between two experts,
        and raises if nobody waits for the result any more.
        """


class Server:
    """Serves the chats that come to a listener, and closes it at the end."""

    def __init__(self, listener: Listener, model: WorkerModel, note: Callable[[str], None]) -> None:
        self._listener = listener
        self._model = model
        self._note = note

    def serve(self, over: Callable[[], bool] = lambda: False) -> None:
        """Serve one chat after another until it is `over`, or Ctrl-C."""
        try:
            while not over():
                interrupts.check()
                # Also while no chat is served, because other programs may need the memory.
                self._model.follow_memory()
                if message := self._listener.receive(_POLL_S):
                    self._serve(message)
        finally:
            self._listener.close()

    def _serve(self, message: PeerMessage) -> None:
        try:
            hello = messages.expect(messages.Hello, messages.unpack(message.data)[0])
            answer = self._answer(hello)
        except Exception as error:
            answer = messages.Refusal(cause="other", text=_reason(error))
        if isinstance(answer, messages.Refusal):
            self._refuse(message.peer, answer)
        else:
            self._converse(message.peer, hello, answer)

    def _answer(self, hello: messages.Hello) -> messages.Welcome | messages.Refusal:
        model = self._model
        if hello.version != __version__:
            return messages.Refusal(cause="version", text=__version__)
        if (hello.model_identity, hello.hidden_size) != (model.identity, model.hidden_size):
            text = messages.describe_model(model.name, model.identity)
            return messages.Refusal(cause="model", text=text)
        arithmetic = model.begin(hello)
        slots = model.slots
        if slots < _MIN_SLOTS:
            text = f"has room for {slots} of the experts, and {_MIN_SLOTS} are the fewest"
            return messages.Refusal(cause="room", text=text)
        return messages.Welcome(slots=slots, arithmetic=arithmetic)

    def _converse(self, peer: Peer, hello: messages.Hello, welcome: messages.Welcome) -> None:

        def refuse_other(message: PeerMessage) -> None:
            with suppress(sockets.BadMessageError):
                messages.expect(messages.Hello, messages.unpack(message.data)[0])
                busy = messages.Refusal(cause="busy", text="is busy with another chat")
                self._refuse(message.peer, busy)

        session = Session(self._listener, peer, self._model, hello, refuse_other)
        try:
            session.send(messages.pack(welcome))
            self._note(f"{peer.name}: a chat begins")
            session.run()
        except Exception as error:
            # libzmq cannot end one connection. The peer ends it when it reads this.
            reason = _reason(error)
            with suppress(sockets.ConnectionLostError):
                session.send(messages.pack(messages.Ended(reason=reason)))
        self._note(f"{peer.name}: the chat ends after {session.requests} requests: {reason}")

    def _refuse(self, peer: Peer, refusal: messages.Refusal) -> None:
        self._note(f"{peer.name}: a chat is refused: {refusal.cause}")
        with suppress(sockets.ConnectionLostError):
            self._listener.send(peer, messages.pack(refusal))


def _reason(error: Exception) -> str:
    return short_message(error) or type(error).__name__


class Session:
    """One chat, from its first request on. `answer_other` gets messages of other peers."""

    def __init__(
        self,
        listener: Listener,
        peer: Peer,
        model: WorkerModel,
        hello: messages.Hello,
        answer_other: Callable[[PeerMessage], None],
    ) -> None:
        self.requests = 0
        self._listener = listener
        self._peer = peer
        self._model = model
        self.send = partial(listener.send, peer)
        self._answer_other = answer_other
        self._dtype = getattr(torch, hello.dtype)
        self._room = model.slots  # that the chat side knows of
        self._loading = False

    def run(self) -> None:
        """Serve until `ConnectionLostError` or an error of the experts is raised."""
        while True:
            message, piece = messages.unpack(self._next())
            if not isinstance(message, messages.Hold):
                self._serve(messages.expect(messages.Compute, message), piece)
                continue
            _require(len(message.keys) <= self._room)
            for layer, expert in message.keys:
                _require(layer < self._model.num_layers and expert < self._model.num_experts)
            self._model.hold([ExpertKey(*key) for key in message.keys])
            self._loading = True

    def _next(self) -> bytes:
        """Return the next message. Load or free experts until there is one."""
        while (message := self._receive(0.0 if self._loading else _POLL_S)) is None:
            if self._loading:  # a request may come meanwhile
                self._loading = self._model.load_next()
            else:
                self._model.follow_memory()
        return message

    def _serve(self, request: messages.Compute, piece: bytes) -> None:
        _require(request.layer < self._model.num_layers)
        _require(all(expert < self._model.num_experts for expert, _ in request.experts))
        x = torch.empty(request.rows_sent, self._model.hidden_size, dtype=self._dtype)

        def receive() -> bytes:
            deadline = time.monotonic() + sockets.SILENCE_S
            while (piece := self._receive(_POLL_S)) is None:
                if time.monotonic() >= deadline:
                    raise sockets.ConnectionLostError("its rows do not arrive")
            return piece

        messages.receive_rows(x, piece, receive)
        start = time.perf_counter()
        y = self._model.compute(request.layer, request.experts, x, request.shared_row, self._check)
        seconds = time.perf_counter() - start
        assert y.shape == (request.rows, self._model.hidden_size)
        assert y.dtype == self._dtype
        messages.send_rows(self.send, messages.Computed(seconds=seconds), y)
        self.requests += 1

    def _check(self) -> None:
        if self._receive(0.0) is not None:
            raise sockets.BadMessageError("it sent a message out of turn")

    def _receive(self, within: float) -> bytes | None:
        interrupts.check()
        message = self._listener.receive(within)
        if message is not None and message.peer == self._peer:
            return message.data
        if not self._listener.has(self._peer):
            if message is not None:
                self._listener.keep(message)  # of the next chat
            raise sockets.ConnectionLostError("it closed the connection")
        if message is not None:
            self._answer_other(message)
        return None


def _require(condition: bool) -> None:
    if not condition:
        raise sockets.BadMessageError("it asked for what the model does not have")
