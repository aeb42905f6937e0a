"""A server that answers a conversation."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mixchat.base.errors import PromptTooLongError, ServerError
from mixchat.base.model_config import UNKNOWN_CONTEXT, Context
from mixchat.base.options import RequestedSampling
from mixchat.chat.answer import COMPLETE, Reason
from mixchat.chat.backend import LEAVE_OUT_HINT, OnPrefill, Turn
from mixchat.engine.stats import GenerationStats
from mixchat.serving.client.server_client import HTTPReply, ServerClient
from mixchat.serving.client.server_json import Comment, ListedModel, Piece, events, read_piece
from mixchat.serving.client.server_url import SERVER_IDENTITY
from mixchat.text.messages import Message
from mixchat.text.thinking import AnswerText

# The comments of mixchat's own server while a request waits, and while it reads a prompt.
_WAITING = "waiting"
_READING = re.compile(r"read ([0-9]{1,9}) of ([0-9]{1,9}) tokens", re.ASCII)
_STREAMED = {"stream": True, "stream_options": {"include_usage": True}}
_NO_TURN = Turn((), (), 0, None, RequestedSampling(), None, (), "stop")


class ServerBackend:
    """A `Backend` for a server's model. `form` has the fields for the form of answers."""

    identity = SERVER_IDENTITY
    engine = None
    can_skip_thinking = True  # as far as one can know

    def __init__(
        self, client: ServerClient, model: ListedModel, form: Mapping[str, Any] | None = None
    ) -> None:
        self._client, self._model, self._form = client, model, form or {}
        self.stats = GenerationStats()
        self._counted: tuple[list[tuple[str, str]], int] = ([], 0)

    @property
    def context(self) -> Context | None:
        size = self._model.context_size
        return None if size is None else Context(size, size)

    def about(self) -> dict[str, str]:
        return {"server": str(self._client.url)}

    def longest_answer(self, max_tokens: int | None) -> int | None:
        return max_tokens or None

    def used_tokens(self, messages: Sequence[Message]) -> int | None:
        """Return the server's count for just these messages, if any."""
        counted, tokens = self._counted
        return tokens if counted == _texts(messages) else None

    def reply(self, turn: Turn, on_prefill: OnPrefill) -> ServerReply:
        """Send the conversation.

        If the server finds it too long, its older half may be left out.
        """
        on_prefill(0, 0)
        first, later = turn.first, turn.questions_after_first()
        while True:
            try:
                return self._send(self._body(turn, first), turn, first, on_prefill)
            except PromptTooLongError as error:
                if not later:
                    raise
                if turn.overflow == "stop":
                    error.hint = LEAVE_OUT_HINT
                    raise
                half = (len(later) - 1) // 2
                first, later = later[half], later[half + 1 :]

    def send(self, body: Mapping[str, Any]) -> ServerReply:
        """Send a request outside a chat."""
        return self._send(body, _NO_TURN, 0, lambda done, total: None)

    def _send(
        self, body: Mapping[str, Any], turn: Turn, first: int, on_prefill: OnPrefill
    ) -> ServerReply:
        started = time.perf_counter()
        stream = self._client.chat({**body, **_STREAMED})
        self.stats = GenerationStats()
        return ServerReply(self, stream, turn, first, started, on_prefill)

    def count(self, messages: Sequence[Message], tokens: int) -> None:
        self._counted = (_texts(messages), tokens)

    def _body(self, turn: Turn, first: int) -> dict[str, Any]:
        messages = [*turn.system, *turn.messages[first:]]
        if turn.before is not None:  # a server continues it if its template can
            messages.append(turn.before)
        given = {name: value for name, value in vars(turn.sampling).items() if value is not None}
        if turn.max_tokens:
            given["max_tokens"] = turn.max_tokens
        if turn.stop:
            given["stop"] = list(turn.stop)
        if not turn.may_think:
            given["chat_template_kwargs"] = {"enable_thinking": False}
        return {
            "model": self._model.name,
            "messages": [{"role": role, "content": content} for role, content in _texts(messages)],
            **given,
            **self._form,
        }


class ServerReply:
    """A server's `Reply`, whose text is in `stream`."""

    def __init__(
        self,
        backend: ServerBackend,
        stream: HTTPReply,
        turn: Turn,
        first: int,
        started: float,
        on_prefill: OnPrefill,
    ) -> None:
        self.first = first
        self.reason: Reason = "interrupted"
        self.close = stream.close
        self._backend, self._stream, self._turn = backend, stream, turn
        self._on_prefill = on_prefill
        self._started, self._first_piece = started, 0.0
        self._text, self._thinking = list[str](), list[str]()  # pieces
        self._length = 0
        self._thinking_tokens = 0
        self._has_usage = False

    def texts(self) -> Iterator[AnswerText]:
        """Yield the text as it comes. Raises `ServerError` if it breaks off."""
        try:
            yield from self._pieces()
        except ServerError:
            if self.reason == "interrupted":
                raise
        finally:
            self._count()
        if self.reason == "interrupted":
            place = "in its middle" if self._text or self._thinking else "before it began"
            hint = "Its own messages may say why; a prompt that is too long is one reason."
            raise ServerError(f"the server ended the answer {place}", hint=hint)

    def message(self) -> Message | None:
        if not (self._text or self._thinking) and self.reason == "interrupted":
            return None
        before = self._turn.before or Message("assistant", "")
        return Message(
            "assistant",
            before.content + "".join(self._text),
            None,
            self.reason not in COMPLETE,
            before.thinking + "".join(self._thinking),
            before.thinking_tokens + self._thinking_tokens,
        )

    def _pieces(self) -> Iterator[AnswerText]:
        for event in events(self._stream.pieces()):
            if isinstance(event, Comment):
                self._show_progress(event.text)
            elif event.strip() == "[DONE]":
                self._end("stop")
                return
            else:
                yield from self._take(read_piece(event))

    def _take(self, piece: Piece) -> Iterator[AnswerText]:
        if piece.text or piece.thinking:
            self._text += [piece.text] if piece.text else []
            self._thinking += [piece.thinking] if piece.thinking else []
            self._thinking_tokens += not self._text
            characters = len(piece.text) + len(piece.thinking)
            self._stream.patience.take_text(characters)
            self._length += characters
            if self._length > (self._backend.context or UNKNOWN_CONTEXT).longest_text:
                raise ServerError("the server sends more text than its context can hold")
            self._backend.stats.generated_tokens += 1  # most servers send a token at a time
            self._time()
            yield AnswerText(piece.text, piece.thinking)
        if piece.reason is not None:
            self._end(piece.reason)
            self._stream.patience.end_soon()  # some servers forget to say that this is the end
        if piece.usage is not None:
            stats, usage = self._backend.stats, piece.usage
            stats.prompt_tokens = usage.prompt_tokens
            stats.reused_tokens = usage.cached_tokens
            stats.generated_tokens = usage.generated_tokens or stats.generated_tokens
            self._has_usage = True

    def _show_progress(self, comment: str) -> None:
        if comment == _WAITING:
            self._stream.patience.wait_in_queue()
        elif found := _READING.fullmatch(comment):
            done, total = int(found[1]), int(found[2])
            if done <= total:
                self._stream.patience.read(done)
                self._on_prefill(done, total)

    def _time(self) -> None:
        now, stats = time.perf_counter(), self._backend.stats
        if not self._first_piece:
            self._first_piece = now
            stats.prefill_seconds = now - self._started
        stats.decode_seconds = now - self._first_piece

    def _end(self, reason: Reason) -> None:
        if self.reason == "interrupted":
            self.reason = reason
            self._time()

    def _count(self) -> None:
        """Note how many tokens the conversation has, if the server has told."""
        if not self._has_usage:
            return
        stats, message, context = self._backend.stats, self.message(), self._backend.context
        tokens = stats.prompt_tokens + stats.generated_tokens
        if self.reason == "length" and context is not None and tokens >= context.tokens:
            self.reason = "context"
        if message is not None and stats.prompt_tokens:
            messages = [*self._turn.system, *self._turn.messages[self.first :], message]
            self._backend.count(messages, tokens)


def _texts(messages: Sequence[Message]) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in messages]
