"""A worker: it serves one chat at a time, and refuses those that it cannot serve."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from mixchat import __version__
from mixchat.base import interrupts
from mixchat.base.errors import short_message
from mixchat.experts.workers import messages
from mixchat.experts.workers.connection import BadMessageError, ConnectionLostError
from mixchat.experts.workers.listener import Listener, Message, Peer
from mixchat.experts.workers.messages import Hello, Kind, Refusal, Welcome, describe_model
from mixchat.experts.workers.session import IDLE_S, HostedExperts, Session

_FEWEST = 2  # experts that must find room


class ServedModel(HostedExperts, Protocol):
    """The model of a worker: what `Server` needs of it, beside its experts."""

    @property
    def identity(self) -> str:
        """Return what names the installed model's bytes, hexadecimal."""

    @property
    def name(self) -> str:
        """Return the model's name, for people."""

    @property
    def hidden_size(self) -> int:
        """Return the elements of a row."""

    def begin(self, hello: Hello) -> Welcome:
        """Prepare for a chat; return what this worker has for it. Raises `MixchatError`."""


class _RefusedError(Exception):
    """A chat cannot be served, for a reason that its chat side is told."""

    def __init__(self, cause: str, text: str) -> None:
        super().__init__(text)
        self.refusal = Refusal(cause, text)


class Server:
    """Serves the chats that come to a listener, and closes it at the end.

    `note` gets a line when a chat begins, ends or is refused.
    """

    def __init__(self, listener: Listener, model: ServedModel, note: Callable[[str], None]) -> None:
        self._listener, self._model, self._note = listener, model, note

    def serve(self, over: Callable[[], bool] = lambda: False) -> None:
        """Serve one chat after another until it is `over`, or until Ctrl-C."""
        try:
            while not over():
                interrupts.check()
                self._model.follow_memory()
                if message := self._listener.receive(IDLE_S):
                    self._serve(message)
        finally:
            self._listener.close()

    def _serve(self, message: Message) -> None:
        """Serve the chat that begins with a message. Whatever is wrong, the next can be served."""
        try:
            hello = self._read(message)
            welcome = self._begin(hello)
        except _RefusedError as error:
            self._refuse(message.peer, error.refusal)
        else:
            self._converse(message.peer, hello, welcome)

    def _read(self, message: Message) -> Hello:
        try:
            hello = messages.unpack_hello(messages.expect(Kind.HELLO, message.data))
        except BadMessageError as error:
            raise _RefusedError("other", error.reason) from None
        if hello.version != __version__:
            raise _RefusedError("version", __version__)
        mine = (self._model.identity, self._model.hidden_size)
        if (hello.model_identity, hello.hidden_size) != mine:
            raise _RefusedError("model", describe_model(self._model.name, self._model.identity))
        return hello

    def _begin(self, hello: Hello) -> Welcome:
        try:
            welcome = self._model.begin(hello)
        except Exception as error:
            raise _RefusedError("other", short_message(error) or type(error).__name__) from error
        if welcome.slots < _FEWEST:
            text = f"has room for {welcome.slots} of the experts, and {_FEWEST} are the fewest"
            raise _RefusedError("room", text)
        return welcome

    def _converse(self, peer: Peer, hello: Hello, welcome: Welcome) -> None:
        session = Session(self._listener, peer, self._model, hello, self._refuse_other)
        try:
            self._listener.send(peer, messages.pack_fields(Kind.WELCOME, welcome))
            self._note(f"{peer.name}: a chat begins")
            session.run()
        except Exception as error:
            # libzmq cannot end the connection to one peer, but the peer does when it reads this.
            reason = short_message(error) or type(error).__name__
            with suppress(ConnectionLostError):
                self._listener.send(peer, messages.pack_fault(reason))
        self._note(f"{peer.name}: the chat ends after {session.requests} requests: {reason}")

    def _refuse_other(self, message: Message) -> None:
        """Answer who comes while a chat is served."""
        if messages.kind_of(message.data) == Kind.HELLO:
            self._refuse(message.peer, Refusal("busy", "is busy with another chat"))

    def _refuse(self, peer: Peer, refusal: Refusal) -> None:
        self._note(f"{peer.name}: a chat is refused: {refusal.cause}")
        with suppress(ConnectionLostError):
            self._listener.send(peer, messages.pack_fields(Kind.REFUSAL, refusal))
