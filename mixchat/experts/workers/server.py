"""A worker: it serves one chat at a time, and refuses those that it cannot serve."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from mixchat import __version__, interrupts
from mixchat.errors import short_message
from mixchat.experts.workers import messages
from mixchat.experts.workers.connection import ConnectionLostError
from mixchat.experts.workers.door import Door, Guest
from mixchat.experts.workers.group import WORKER, Group
from mixchat.experts.workers.messages import (
    BEAT,
    Hello,
    Kind,
    Refusal,
    Welcome,
    describe_model,
)
from mixchat.experts.workers.session import HostedExperts, Session

_ENDING = 2.0  # seconds that a new chat waits for the end of the one before
_SLICE = 0.05  # seconds between two looks for Ctrl-C
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

    `note` gets a line when a chat begins, ends or is refused, and now and then one on a stranger;
    it may be called in any thread.
    """

    def __init__(
        self,
        listener: socket.socket,
        key: bytes,
        model: ServedModel,
        note: Callable[[str], None],
        beat: float = BEAT,
    ) -> None:
        self._model, self._note, self._beat = model, note, beat
        self._door = Door(listener, key, self._admit, note)
        self._changed = threading.Condition()
        self._taken = False  # by a chat that is served, or is about to be
        self._guest: Guest | None = None  # that is about to be served
        self._over = False

    def serve(self, over: Callable[[], bool] = lambda: False) -> None:
        """Serve one chat after the other, until `over`, or until Ctrl-C or SIGTERM raises."""
        self._door.open()
        try:
            while guest := self._next_guest(over):
                self._serve(guest)
        finally:
            self._door.close()
            with self._changed:
                self._over = True
                if self._guest is not None:
                    self._guest.connection.close()

    def _next_guest(self, over: Callable[[], bool]) -> Guest | None:
        """Return the next guest when there is one; None where it is `over`."""
        while not over():
            interrupts.check()
            self._model.follow_memory()
            with self._changed:
                if self._guest is None:
                    self._changed.wait(_SLICE)
                guest, self._guest = self._guest, None
            if guest is not None:
                return guest
        return None

    def _admit(self, guest: Guest) -> None:
        """Let a guest be the next one, or send it away. Called in a thread of the guest's own."""
        try:
            self._check(guest.hello)
            with self._changed:
                self._changed.wait_for(lambda: not self._taken or self._over, _ENDING)
                if self._taken or self._over:
                    raise _RefusedError("busy", "is busy with another chat")
                self._taken, self._guest = True, guest
                self._changed.notify_all()
        except _RefusedError as error:
            self._refuse(guest, error.refusal)
            guest.connection.close()

    def _check(self, hello: Hello) -> None:
        if hello.version != __version__:
            raise _RefusedError("version", __version__)
        mine = (self._model.identity, self._model.hidden_size)
        if (hello.model_identity, hello.hidden_size) != mine:
            raise _RefusedError("model", describe_model(self._model.name, self._model.identity))

    def _serve(self, guest: Guest) -> None:
        """Serve one chat. Whatever is wrong with it, the next one can be served."""
        try:
            self._converse(guest)
        except _RefusedError as error:
            self._refuse(guest, error.refusal)
        finally:
            guest.connection.close()
            with self._changed:
                self._taken = False
                self._changed.notify_all()

    def _converse(self, guest: Guest) -> None:
        welcome = self._begin(guest.hello)
        session: Session | None = None
        try:
            guest.connection.send(Kind.WELCOME, messages.pack_fields(welcome))
            group = Group(guest.connection, WORKER, guest.proofs)
            session = Session(guest.connection, group, self._model, guest.hello, self._beat)
            self._note(f"{guest.name}: a chat begins")
            session.run()
        except ConnectionLostError as error:
            reason = error.reason
        except Exception as error:
            reason = short_message(error) or type(error).__name__
            with suppress(ConnectionLostError):
                guest.connection.send(Kind.FAILED, messages.pack_text(reason))
        requests = session.requests if session else 0
        self._note(f"{guest.name}: the chat ends after {requests} requests: {reason}")

    def _begin(self, hello: Hello) -> Welcome:
        try:
            welcome = self._model.begin(hello)
        except Exception as error:
            raise _RefusedError("other", short_message(error) or type(error).__name__) from error
        if welcome.slots < _FEWEST:
            text = f"has room for {welcome.slots} of the experts, and {_FEWEST} are the fewest"
            raise _RefusedError("room", text)
        return welcome

    def _refuse(self, guest: Guest, refusal: Refusal) -> None:
        self._note(f"{guest.name}: a chat is refused: {refusal.cause}")
        with suppress(ConnectionLostError):
            guest.connection.send(Kind.REFUSAL, messages.pack_fields(refusal))
