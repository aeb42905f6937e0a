"""A model of a server, as a chat and a file of prompts ask it."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

from mixchat.base.context import UNKNOWN_CONTEXT, Context
from mixchat.base.errors import PromptTooLongError, ServerError
from mixchat.engine.stats import GenerationStats
from mixchat.face.events import COMPLETE, End, Event, LeftOut, Piece, Reading, Reason
from mixchat.face.prompt import LEAVE_OUT_HINT
from mixchat.face.request import Request, shown_message
from mixchat.serving.client.server_client import HTTPReply, ServerClient
from mixchat.serving.client.server_json import Chunk, Comment, ListedModel, events, read_chunk
from mixchat.serving.client.server_url import SERVER_IDENTITY
from mixchat.text.form.output_constraint import OutputConstraint
from mixchat.text.messages import Message

# The comments of the server while a request waits, and while it reads a prompt.
_WAITING = "waiting"
_READING = re.compile(r"read ([0-9]{1,9}) of ([0-9]{1,9}) tokens", re.ASCII)
_STREAMED = {"stream": True, "stream_options": {"include_usage": True}}


class ServerModel:
    """The `ChatModel` of a model on a server."""

    identity = SERVER_IDENTITY
    engine = None
    sampling = None
    can_skip_thinking = True  # as far as one can know
    knows_tools = False  # which the chat does not send

    def __init__(self, client: ServerClient, model: ListedModel) -> None:
        self._client = client
        self._model = model
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

    def close(self) -> None:
        """Do nothing, because each request has its own connection."""

    def ask(self, request: Request) -> ServerAnswer:
        """Send the conversation. If the server finds it too long, its older half may be left out.

        Raises as `ServerClient.chat` does.
        """
        messages = list(request.messages)
        system = list(takewhile(lambda message: message.role == "system", messages))
        talk = messages[len(system) :]
        first = 0
        later = [i for i, message in enumerate(talk) if i and message.role == "user"]
        while True:
            sent = [*system, *talk[first:]]
            try:
                return self.send(self._body(request, sent), sent, left_out=talk[:first])
            except PromptTooLongError as error:
                if not later:
                    raise
                if request.overflow == "stop":
                    error.hint = LEAVE_OUT_HINT
                    raise
                half = (len(later) - 1) // 2
                first = later[half]
                later = later[half + 1 :]

    def send(
        self,
        body: Mapping[str, Any],
        messages: Sequence[Message] = (),
        left_out: Sequence[Message] = (),
    ) -> ServerAnswer:
        """Send a body as it is. `messages` are those in it, without those that were left out."""
        started = time.perf_counter()
        stream = self._client.chat({"model": self._model.name, **body, **_STREAMED})
        return ServerAnswer(self, stream, messages, left_out, started)

    def count(self, messages: Sequence[Message], tokens: int) -> None:
        self._counted = (_texts(messages), tokens)

    def _body(self, request: Request, messages: Sequence[Message]) -> dict[str, Any]:
        assert isinstance(request.sampling, Mapping)  # of a chat, which sends what was chosen
        body = dict(request.sampling)
        if request.max_tokens:
            body["max_tokens"] = request.max_tokens
        if request.stop:
            body["stop"] = list(request.stop)
        if request.think is not None:
            body["chat_template_kwargs"] = {"enable_thinking": request.think}
        if isinstance(request.form, OutputConstraint):
            body |= request.form.request_fields()
        return {
            "messages": [{"role": role, "content": content} for role, content in _texts(messages)],
            **body,
        }


class ServerAnswer:
    """The `AnswerEvents` of a server, whose bytes are in `stream`."""

    def __init__(
        self,
        model: ServerModel,
        stream: HTTPReply,
        messages: Sequence[Message],
        left_out: Sequence[Message],
        started: float,
    ) -> None:
        self.close = stream.close
        self.stats = GenerationStats()
        self._model = model
        self._stream = stream
        self._messages = messages
        self._answered = Message("assistant", "")
        if messages and messages[-1].role == "assistant":
            self._answered = messages[-1]
        self._started = started
        self._first_piece = 0.0
        self._shown: list[Piece] = []
        self._characters = self._thinking_tokens = 0
        self._reason: Reason = "interrupted"
        self._has_usage = self._is_cancelled = False
        self._events = self._read(left_out)

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        if self._is_cancelled:
            raise StopIteration
        return next(self._events)

    def cancel(self) -> None:
        self._is_cancelled = True

    def message(self) -> Message | None:
        message = shown_message(self._answered, self._shown)
        if self._reason == "interrupted":
            return message
        is_partial = self._reason not in COMPLETE
        return replace(message or self._answered, ids=None, partial=is_partial)

    def _read(self, left_out: Sequence[Message]) -> Iterator[Event]:
        """Yield the events as they come. Raises `ServerError` if the answer breaks off."""
        if left_out:
            yield LeftOut.of(left_out)
        yield Reading(0, 0)
        try:
            for event in events(self._stream.pieces()):
                if isinstance(event, Comment):
                    yield from self._progress(event.text)
                elif event.strip() == "[DONE]":
                    break
                else:
                    yield from self._take(read_chunk(event))
        except ServerError:
            if self._reason == "interrupted":
                raise
        if self._reason == "interrupted":
            moment = "in its middle" if self._shown else "before it began"
            hint = "Its own messages may say why; a prompt that is too long is one reason."
            raise ServerError(f"the server ended the answer {moment}", hint=hint)
        yield self._last()

    def _take(self, chunk: Chunk) -> Iterator[Piece]:
        texts = (chunk.text, chunk.thinking, *(call.arguments for call in chunk.calls))
        if characters := sum(map(len, texts)) or len(chunk.calls):
            self._characters += characters
            self._stream.patience.take_text(characters)
            if self._characters > (self._model.context or UNKNOWN_CONTEXT).longest_text:
                raise ServerError("the server sends more text than its context can hold")
            self.stats.generated_tokens += 1  # the server sends about a token at a time
            self._thinking_tokens += chunk.thinking != ""
            self._time()
            piece = Piece(chunk.text, chunk.thinking, chunk.calls, (), self._thinking_tokens)
            self._shown.append(piece)
            yield piece
        if chunk.reason is not None:
            self._reason = chunk.reason
            self._time()
            self._stream.patience.end_soon()
        if chunk.usage is not None:
            self.stats.prompt_tokens = chunk.usage.prompt_tokens
            self.stats.reused_tokens = chunk.usage.cached_tokens
            self.stats.generated_tokens = chunk.usage.generated_tokens
            self._has_usage = True

    def _progress(self, comment: str) -> Iterator[Reading]:
        if comment == _WAITING:
            self._stream.patience.wait_in_queue()
        elif progress := _READING.fullmatch(comment):
            done = int(progress[1])
            total = int(progress[2])
            if done <= total:
                self._stream.patience.read(done)
                yield Reading(done, total)

    def _time(self) -> None:
        now = time.perf_counter()
        if not self._first_piece:
            self._first_piece = now
            self.stats.prefill_seconds = now - self._started
        self.stats.decode_seconds = now - self._first_piece

    def _last(self) -> End:
        """Return the end, and note how many tokens the conversation has."""
        stats = self.stats
        context = self._model.context
        tokens = stats.prompt_tokens + stats.generated_tokens
        if self._reason == "length" and context is not None and tokens >= context.tokens:
            self._reason = "context"
        message = self.message()
        is_thinking = bool(self._shown) and not any(piece.text for piece in self._shown)
        if message is not None and self._has_usage and stats.prompt_tokens:
            asked = [each for each in self._messages if each is not self._answered]
            self._model.count([*asked, message], tokens)
        return End(
            self._reason, stats, self._thinking_tokens, message=message, is_thinking=is_thinking
        )


def _texts(messages: Sequence[Message]) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in messages]
