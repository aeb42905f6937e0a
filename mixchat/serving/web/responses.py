"""The form of answers, OpenAI's response objects, and counts for Prometheus."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from mixchat.face.events import End, Piece, TokenLogprob
from mixchat.serving.requests.errors import RequestError
from mixchat.serving.requests.fields import JSON, read_object, to_json
from mixchat.serving.requests.shared import APIRequest
from mixchat.text.tokenizer import TokenTexts
from mixchat.text.tool_call import CallDelta, call_object, joined_calls

if TYPE_CHECKING:
    from mixchat.face.model import Model
    from mixchat.face.model_thread import ModelStats

_MIN_LOGPROB = -9999.0  # stands for minus infinity, which JSON lacks
_FINISH = {
    **{"stop": "stop", "stop_string": "stop", "length": "length", "context": "length"},
    "tool_calls": "tool_calls",
}
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"  # of Prometheus
# Name, type, field of the counts, help.
_METRICS = (
    ("requests_running", "gauge", "running", "Answers that are being generated."),
    ("requests_waiting", "gauge", "waiting", "Answers that wait for their turn."),
    ("requests_finished_total", "counter", "finished", "Answers that came to their end."),
    ("requests_cancelled_total", "counter", "cancelled", "Answers whose client left."),
    ("requests_failed_total", "counter", "failed", "Answers that failed."),
    ("prompt_tokens_total", "counter", "prompt_tokens", "Tokens of prompts that were processed."),
    ("cached_tokens_total", "counter", "cached_tokens", "Tokens of prompts that were cached."),
    ("generated_tokens_total", "counter", "generated_tokens", "Tokens of answers."),
    ("busy_seconds_total", "counter", "busy_seconds", "Seconds in which the model computed."),
    ("expert_hits_total", "counter", "expert_hits", "Uses of experts that were in memory."),
    ("expert_misses_total", "counter", "expert_misses", "Uses of experts that were fetched."),
    ("expert_bytes_total", "counter", "bytes_moved", "Bytes of experts that were fetched."),
)


class ResponseBuilder(ABC):
    """Builds the answers to one request in the form of an API, whole or as parts of a stream."""

    content_type = "text/event-stream; charset=utf-8"  # of a stream

    def __init__(self, request: APIRequest, model: Model) -> None:
        self._request = request
        self._model = model.name

    @abstractmethod
    def whole(self, answers: Sequence[tuple[Piece, End]]) -> JSON:
        """Return the body of whole answers."""

    def beginning(self) -> bytes:
        """Return what comes before all text."""
        return b""

    @abstractmethod
    def piece(self, number: int, piece: Piece) -> bytes: ...

    @abstractmethod
    def ending(self, number: int, end: End) -> bytes:
        """Return the end of one answer."""

    @abstractmethod
    def failure(self, error: RequestError) -> bytes:
        """Return an error, since the status is sent already."""

    def finish(self, ends: Sequence[End]) -> bytes:
        """Return what comes after all answers."""
        return b""

    def close(self) -> bytes:
        """Return what comes last, also after an error."""
        return b""

    def comment(self, text: str) -> bytes:
        """Return a sign of life. A form without comments has none."""
        return f": {text}\n\n".encode()

    def prompt_counts(self, ends: Sequence[End]) -> tuple[int, int]:
        """Return the tokens of prompts and the cached ones among them.

        A prompt counts once, however many answers it has.
        """
        prompt = sum(len(prompt.ids) for prompt in self._request.prompts[:: self._request.n])
        cached = sum(end.stats.reused_tokens for end in ends[:: self._request.n])
        return prompt, min(prompt, cached)


class OpenAIResponses(ResponseBuilder):
    """Chats and completions. The field `seed`, also of a drawn seed, is mixchat's own."""

    prefix: str  # of the ID
    name: str  # of the object
    chunk_name: str

    def __init__(self, request: APIRequest, model: Model) -> None:
        super().__init__(request, model)
        has_logprobs = request.requests[0].top_logprobs is not None
        self._texts = TokenTexts(model.tokenizer) if has_logprobs else None
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": self._model,
            "seed": request.sampling.seed,
        }

    def whole(self, answers: Sequence[tuple[Piece, End]]) -> JSON:
        choices = [
            self._choice(number, text, _FINISH[end.reason], whole=True)
            for number, (text, end) in enumerate(answers)
        ]
        usage = self._usage([end for _, end in answers])
        return {**self._head, "object": self.name, "choices": choices, "usage": usage}

    def piece(self, number: int, piece: Piece) -> bytes:
        return self._chunk(self._choice(number, piece, None))

    def ending(self, number: int, end: End) -> bytes:
        return self._chunk(self._choice(number, Piece(), _FINISH[end.reason]))

    def failure(self, error: RequestError) -> bytes:
        return to_event(error.body)

    def finish(self, ends: Sequence[End]) -> bytes:
        """Return the chunk with the counts of tokens, if it is requested."""
        return self._chunk(usage=self._usage(ends)) if self._request.include_usage else b""

    def close(self) -> bytes:
        return b"data: [DONE]\n\n"

    @abstractmethod
    def _choice(self, number: int, piece: Piece, finish: str | None, whole: bool = False) -> JSON:
        """Return an answer, or a part of it. The last part has a reason to finish."""

    def _chunk(self, *choices: JSON, usage: JSON | None = None) -> bytes:
        # If usage is requested, every chunk has the field, which is null in all but the last.
        used = {"usage": usage} if self._request.include_usage else {}
        chunk = {**self._head, "object": self.chunk_name, "choices": list(choices), **used}
        return to_event(chunk)

    def _usage(self, ends: Sequence[End]) -> JSON:
        prompt, cached = self.prompt_counts(ends)
        generated = sum(end.stats.generated_tokens for end in ends)
        thought = sum(end.thinking_tokens for end in ends)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": cached},
            **({"completion_tokens_details": {"reasoning_tokens": thought}} if thought else {}),
        }


class ChatResponses(OpenAIResponses):
    """The answers of /v1/chat/completions."""

    prefix = "chatcmpl"
    name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def beginning(self) -> bytes:
        """Return a chunk for each answer with its role."""
        # Clients take the role from the first chunk, before the model has read the prompt.
        role = {"delta": {"role": "assistant", "content": ""}, "logprobs": None}
        numbers = range(len(self._request.requests))
        return b"".join(self._chunk({"index": n, **role, "finish_reason": None}) for n in numbers)

    def _choice(self, number: int, piece: Piece, finish: str | None, whole: bool = False) -> JSON:
        thinking = {"reasoning_content": piece.thinking} if piece.thinking else {}
        content: JSON
        if whole:
            calls = list(map(call_object, joined_calls(piece.calls)))
            said = piece.text or (None if calls else "")
            message = {"role": "assistant", "content": said, "refusal": None, **thinking}
            content = {"message": {**message, **({"tool_calls": calls} if calls else {})}}
        elif finish is not None:
            content = {"delta": {}}
        else:
            calls = list(map(_call_delta, piece.calls))
            text = {"content": piece.text} if piece.text or not (thinking or calls) else {}
            content = {"delta": {**thinking, **text, **({"tool_calls": calls} if calls else {})}}
        logprobs = None
        if self._texts is not None and (whole or piece.tokens):
            tokens = [_token_object(token, self._texts) for token in piece.tokens]
            logprobs = {"content": tokens, "refusal": None}
        return {"index": number, **content, "logprobs": logprobs, "finish_reason": finish}


class CompletionResponses(OpenAIResponses):
    """The answers of /v1/completions."""

    prefix = "cmpl"
    name = "text_completion"
    chunk_name = "text_completion"

    def __init__(self, request: APIRequest, model: Model) -> None:
        super().__init__(request, model)
        self._lengths = [0] * len(request.requests)  # of the tokens' texts so far, in characters

    def _choice(self, number: int, piece: Piece, finish: str | None, whole: bool = False) -> JSON:
        texts = self._texts
        logprobs = None
        if texts is not None:
            offsets = []
            for token in piece.tokens:
                offsets.append(self._lengths[number])
                self._lengths[number] += len(texts[token.token])
            logprobs = {
                "tokens": [texts[token.token] for token in piece.tokens],
                "token_logprobs": [_finite(token.logprob) for token in piece.tokens],
                "top_logprobs": [
                    {texts[t]: _finite(p) for t, p in token.top} for token in piece.tokens
                ],
                "text_offset": offsets,
            }
        return {"index": number, "text": piece.text, "logprobs": logprobs, "finish_reason": finish}


def to_event(value: JSON, name: str | None = None) -> bytes:
    """Return an event of a stream."""
    named = b"" if name is None else f"event: {name}\n".encode()
    return named + b"data: " + to_json(value) + b"\n\n"


def call_arguments(text: str) -> JSON | None:
    """Return the arguments of a call, None if they are no whole JSON object."""
    with suppress(RequestError):
        return read_object((text or "{}").encode())
    return None


def _token_object(token: TokenLogprob, texts: TokenTexts) -> JSON:
    """Return a token of a chat with the likeliest tokens."""

    def entry(id: int, logprob: float) -> JSON:
        return {"token": texts[id], "logprob": _finite(logprob), "bytes": list(texts.bytes_of(id))}

    top = [entry(id, logprob) for id, logprob in token.top]
    return {**entry(token.token, token.logprob), "top_logprobs": top}


def _call_delta(delta: CallDelta) -> JSON:
    if not delta.id:
        return {"index": delta.index, "function": {"arguments": delta.arguments}}
    return {"index": delta.index, **call_object(delta)}


def to_prometheus(stats: ModelStats) -> str:
    """Return the counts as text."""
    lines = []
    for name, metric_type, count, about in _METRICS:
        full = f"mixchat_{name}"
        lines += [f"# HELP {full} {about}", f"# TYPE {full} {metric_type}"]
        lines += [f"{full} {getattr(stats, count)}"]
    return "\n".join(lines) + "\n"


def _finite(logprob: float) -> float:
    return max(logprob, _MIN_LOGPROB)
