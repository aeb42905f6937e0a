"""Mutual challenge and response: both ends prove that they know the key, which never travels."""

from __future__ import annotations

import hmac
import secrets
from dataclasses import dataclass

from mixchat.experts.workers.connection import Connection, ConnectionLostError, NoAnswerError

MAGIC = b"mixchat worker 1"

_SIZE = 32  # bytes of a nonce, and of a proof


class NotAWorkerError(ConnectionLostError):
    """Something else than a worker answers."""


class WrongKeyError(ConnectionLostError):
    """The other end does not know the key."""


@dataclass(frozen=True)
class Proofs:
    """The bytes that each end sends over the group, to prove that it is the one of this connection.

    Each proof has 32 of them.
    """

    chat: bytes
    worker: bytes


def greet_worker(connection: Connection, key: bytes, deadline: float) -> Proofs:
    """Take the chat side's part.

    Raises `NotAWorkerError`, `WrongKeyError` or `NoAnswerError`, each a `ConnectionLostError`.
    """
    try:
        greeting = connection.receive_bytes(len(MAGIC), deadline)
    except NoAnswerError:
        raise
    except ConnectionLostError as error:
        raise NotAWorkerError(error.reason) from None
    if greeting != MAGIC:
        raise NotAWorkerError("it is not a worker of mixchat")
    nonces = connection.receive_bytes(_SIZE, deadline)
    mine = secrets.token_bytes(_SIZE)
    nonces += mine
    connection.send_bytes(mine + _proof(key, b"chat", nonces))
    try:
        answer = connection.receive_bytes(_SIZE, deadline)
    except NoAnswerError:
        raise
    except ConnectionLostError:  # a worker closes without a word
        raise WrongKeyError("it has another key") from None
    _check(answer, _proof(key, b"worker", nonces))
    return _group_proofs(key, nonces)


def greet_chat(connection: Connection, key: bytes, deadline: float) -> Proofs:
    """Take the worker's part. Raises `WrongKeyError`, or another `ConnectionLostError`."""
    nonces = secrets.token_bytes(_SIZE)
    connection.send_bytes(MAGIC + nonces)
    nonces += connection.receive_bytes(_SIZE, deadline)
    _check(connection.receive_bytes(_SIZE, deadline), _proof(key, b"chat", nonces))
    connection.send_bytes(_proof(key, b"worker", nonces))
    return _group_proofs(key, nonces)


def _group_proofs(key: bytes, nonces: bytes) -> Proofs:
    return Proofs(_proof(key, b"group chat", nonces), _proof(key, b"group worker", nonces))


def _proof(key: bytes, role: bytes, nonces: bytes) -> bytes:
    """Return a proof of knowing `key`, of use to this end of this connection only."""
    return hmac.digest(key, role + b"\0" + nonces, "sha256")


def _check(given: bytes, expected: bytes) -> None:
    if not hmac.compare_digest(given, expected):
        raise WrongKeyError("it has another key")
