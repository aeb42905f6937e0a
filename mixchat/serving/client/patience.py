"""How long a server may take, and how much it may send, until something comes of it.

A large prompt is read in silence, or among comments that keep the connection open. So a request's
time grows with its size, each token that comes brings more, and waiting in a queue has a limit of
its own. What brings no token, such as 1xx responses, comments and empty pieces, is limited in bytes
as well, because a server could send it without an end.
"""

from __future__ import annotations

import time

from mixchat.base.errors import ServerError
from mixchat.base.http import ReadLimits

_HEAD_BYTES = 2**20  # before an answer begins
_BODY_BYTES = 2**24  # without a piece of text
_PIECE_BYTES, _CHARACTER_BYTES = 2**16, 16  # more for a piece of text
_ANSWER_S = 3600.0  # without a token
_BYTE_S = 0.25  # more seconds for each byte of the request; 4 bytes are about a token
_TOKEN_S = 60.0  # more for each token
_QUEUE_S = 12 * 3600.0  # for requests of others
_SMALL_S = 300.0  # for a list of models
_REASON_S = 10.0  # for the reason of a refusal
_END_S = 2.0  # after the last piece of an answer
_OWN_TOKENS = 2**16  # of a prompt that a server adds to the request


class Patience(ReadLimits):
    """The limits of an answer. `sent` is the request's size, None if it has no body.

    `seconds` and `take` raise `ServerError` when nothing is left.
    """

    def __init__(self, sent: int | None = None) -> None:
        super().__init__(_HEAD_BYTES, _SMALL_S if sent is None else _ANSWER_S + _BYTE_S * sent)
        self._started = time.monotonic()
        self._sent = sent or 0
        self._read = 0  # tokens of the prompt
        self._may_extend = True

    def too_slow(self) -> ServerError:
        return ServerError("the server takes too long")

    def too_much(self) -> ServerError:
        return ServerError("the server sends without an end what is no answer")

    def begin(self) -> None:
        """Allow more bytes, since the answer begins."""
        self.bytes_left = _BODY_BYTES

    def take_text(self, characters: int) -> None:
        """Allow more, since a piece of text came."""
        more = _PIECE_BYTES + _CHARACTER_BYTES * characters
        self.bytes_left = min(self.bytes_left + more, _BODY_BYTES)
        self._extend(_TOKEN_S)

    def read(self, tokens: int) -> None:
        """Allow more, since the server says that it has read so many tokens of the prompt."""
        if self._read < tokens <= self._sent + _OWN_TOKENS:
            self._extend(_TOKEN_S * (tokens - self._read))
            self._read = tokens

    def wait_in_queue(self) -> None:
        """Allow more, since the server says that others come first."""
        if self._may_extend and not self._read:
            now = time.monotonic()
            latest = min(now + _ANSWER_S, self._started + _QUEUE_S)
            self.deadline = max(self.deadline, latest)

    def end_soon(self) -> None:
        """Allow 2 s from here on, since the answer has ended."""
        self._end_within(_END_S)

    def give_reason(self) -> None:
        """Allow 10 s from here on, since only the reason of a refusal is missing."""
        self._end_within(_REASON_S)

    def _end_within(self, seconds: float) -> None:
        self.deadline = min(self.deadline, time.monotonic() + seconds)
        self._may_extend = False

    def _extend(self, seconds: float) -> None:
        if self._may_extend:
            latest = max(time.monotonic() + _ANSWER_S, self.deadline)
            self.deadline = min(self.deadline + seconds, latest)
