"""The form of answers, OpenAI's response objects, and counts for Prometheus."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TypeAlias

from mixchat.serving.requests.body import read_object
from mixchat.serving.requests.errors import RequestError, to_json
from mixchat.serving.requests.options import LoadedModel, ParsedRequest
from mixchat.serving.requests.tools import call_object
from mixchat.serving.service import Delta, Done, ServiceStats, TokenLogprob
from mixchat.text.tool_call import CallDelta, joined_calls

JSON: TypeAlias = dict[str, Any]
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

    def __init__(self, request: ParsedRequest, model: LoadedModel) -> None:
        self._request, self._model, self._texts = request, model.service.name, model.texts

    @abstractmethod
    def whole(self, answers: Sequence[tuple[Delta, Done]]) -> JSON:
        """Return the body of whole answers."""

    def beginning(self) -> bytes:
        """Return what comes before all text."""
        return b""

    @abstractmethod
    def piece(self, number: int, delta: Delta) -> bytes: ...

    @abstractmethod
    def ending(self, number: int, done: Done) -> bytes:
        """Return the end of one answer."""

    @abstractmethod
    def failure(self, error: RequestError) -> bytes:
        """Return an error, since the status is sent already."""

    def finish(self, done: Sequence[Done]) -> bytes:
        """Return what comes after all answers."""
        return b""

    def close(self) -> bytes:
        """Return what comes last, also after an error."""
        return b""

    def comment(self, text: str) -> bytes:
        """Return a sign of life. A form without comments has none."""
        return f": {text}\n\n".encode()

    def prompt_counts(self, done: Sequence[Done]) -> tuple[int, int]:
        """Return the tokens of prompts and the cached ones among them.

        A prompt counts once, however many answers it has.
        """
        prompt = sum(len(job.prompt_ids) for job in self._request.jobs[:: self._request.n])
        cached = sum(each.cached_tokens for each in done[:: self._request.n])
        return prompt, min(prompt, cached)


class OpenAIResponses(ResponseBuilder):
    """Chats and completions. `seed` is mixchat's own field, also for a drawn seed."""

    prefix: str  # of the ID
    name: str  # of the object
    chunk_name: str

    def __init__(self, request: ParsedRequest, model: LoadedModel) -> None:
        super().__init__(request, model)
        self._has_logprobs = request.jobs[0].top_logprobs is not None
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": self._model,
            "seed": request.seed,
        }

    def whole(self, answers: Sequence[tuple[Delta, Done]]) -> JSON:
        choices = [
            self._choice(number, text, _FINISH[done.reason], whole=True)
            for number, (text, done) in enumerate(answers)
        ]
        usage = self._usage([done for _, done in answers])
        return {**self._head, "object": self.name, "choices": choices, "usage": usage}

    def piece(self, number: int, delta: Delta) -> bytes:
        return self._chunk(self._choice(number, delta, None))

    def ending(self, number: int, done: Done) -> bytes:
        return self._chunk(self._choice(number, Delta(""), _FINISH[done.reason]))

    def failure(self, error: RequestError) -> bytes:
        return to_event(error.body)

    def finish(self, done: Sequence[Done]) -> bytes:
        """Return the chunk with the counts of tokens, if it is requested."""
        return self._chunk(usage=self._usage(done)) if self._request.include_usage else b""

    def close(self) -> bytes:
        return b"data: [DONE]\n\n"

    @abstractmethod
    def _choice(self, number: int, part: Delta, finish: str | None, whole: bool = False) -> JSON:
        """Return an answer, or a part of it. The last part has a reason to finish."""

    def _chunk(self, *choices: JSON, usage: JSON | None = None) -> bytes:
        used = {"usage": usage} if self._request.include_usage else {}
        chunk = {**self._head, "object": self.chunk_name, "choices": list(choices), **used}
        return to_event(chunk)

    def _usage(self, done: Sequence[Done]) -> JSON:
        prompt, cached = self.prompt_counts(done)
        generated = sum(each.generated_tokens for each in done)
        thought = sum(each.thinking_tokens for each in done)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": cached},
            **({"completion_tokens_details": {"reasoning_tokens": thought}} if thought else {}),
        }


class ChatResponses(OpenAIResponses):
    """The answers of /v1/chat/completions."""

    prefix, name, chunk_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def beginning(self) -> bytes:
        """Return a chunk for each answer with its role."""
        role = {"delta": {"role": "assistant", "content": ""}, "logprobs": None}
        numbers = range(len(self._request.jobs))
        return b"".join(self._chunk({"index": n, **role, "finish_reason": None}) for n in numbers)

    def _choice(self, number: int, part: Delta, finish: str | None, whole: bool = False) -> JSON:
        thinking = {"reasoning_content": part.thinking} if part.thinking else {}
        calls = {"tool_calls": list(map(_call_delta, part.calls))} if part.calls else {}
        text = {"content": part.text} if part.text or not (thinking or calls) else {}
        content: dict[str, Any] = {"delta": {**thinking, **text, **calls} if finish is None else {}}
        if whole:
            calls = (
                {"tool_calls": list(map(call_object, joined_calls(part.calls)))} if calls else {}
            )
            said = part.text or (None if calls else "")
            message = {"role": "assistant", "content": said, "refusal": None, **thinking, **calls}
            content = {"message": message}
        logprobs = None
        if self._has_logprobs and (whole or part.tokens):
            logprobs = {"content": list(map(self._token, part.tokens)), "refusal": None}
        return {"index": number, **content, "logprobs": logprobs, "finish_reason": finish}

    def _token(self, token: TokenLogprob) -> JSON:
        top = [self._logprob(other, logprob) for other, logprob in token.top]
        return {**self._logprob(token.token, token.logprob), "top_logprobs": top}

    def _logprob(self, token: int, logprob: float) -> JSON:
        data = self._texts.bytes_of(token)
        return {"token": self._texts[token], "logprob": _finite(logprob), "bytes": list(data)}


class CompletionResponses(OpenAIResponses):
    """The answers of /v1/completions."""

    prefix, name, chunk_name = "cmpl", "text_completion", "text_completion"

    def __init__(self, request: ParsedRequest, model: LoadedModel) -> None:
        super().__init__(request, model)
        self._lengths = [0] * len(request.jobs)  # of the tokens' texts so far, in characters

    def _choice(self, number: int, part: Delta, finish: str | None, whole: bool = False) -> JSON:
        logprobs = self._logprobs(number, part.tokens) if self._has_logprobs else None
        return {"index": number, "text": part.text, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, number: int, tokens: Sequence[TokenLogprob]) -> JSON:
        texts, offsets = self._texts, []
        for token in tokens:
            offsets.append(self._lengths[number])
            self._lengths[number] += len(texts[token.token])
        return {
            "tokens": [texts[token.token] for token in tokens],
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [{texts[t]: _finite(p) for t, p in token.top} for token in tokens],
            "text_offset": offsets,
        }


def to_event(value: JSON, name: str | None = None) -> bytes:
    """Return an event of a stream."""
    named = b"" if name is None else f"event: {name}\n".encode()
    return named + b"data: " + to_json(value) + b"\n\n"


def call_arguments(text: str) -> JSON | None:
    """Return the arguments of a call, None if they are no whole JSON object."""
    with suppress(RequestError):
        return read_object((text or "{}").encode())
    return None


def _call_delta(delta: CallDelta) -> JSON:
    if not delta.id:
        return {"index": delta.index, "function": {"arguments": delta.arguments}}
    return {"index": delta.index, **call_object(delta)}


def to_prometheus(stats: ServiceStats) -> str:
    """Return the counts as text."""
    lines = []
    for name, kind, count, about in _METRICS:
        full = f"mixchat_{name}"
        lines += [f"# HELP {full} {about}", f"# TYPE {full} {kind}"]
        lines += [f"{full} {getattr(stats, count)}"]
    return "\n".join(lines) + "\n"


def _finite(logprob: float) -> float:
    return max(logprob, _MIN_LOGPROB)
