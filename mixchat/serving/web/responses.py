"""The objects of OpenAI's API that answer a request, and counts for Prometheus."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mixchat.serving.requests.options import ParsedRequest
from mixchat.serving.service import Delta, Done, ServiceStats, TokenLogprob
from mixchat.text.tokenizer import Tokenizer

_LEAST = -9999.0  # stands for minus infinity, which JSON cannot express


class TokenTexts:
    """The bytes of each token; a control token, which adds none to a text, has its name."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._names = {token: name.encode() for name, token in tokenizer.control_tokens.items()}
        self._bytes: Sequence[bytes] | None = None

    def load(self) -> None:
        """Ask the tokenizer, which may take a second, and no time when it was asked before."""
        if self._bytes is None:
            self._bytes = self._tokenizer.token_bytes().within

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes of a token, once they are loaded."""
        assert self._bytes is not None
        known = self._bytes[token] if token < len(self._bytes) else b""
        return known or self._names.get(token, b"")

    def __getitem__(self, token: int) -> str:
        """Return the text of a token by itself; a part of a character is U+FFFD."""
        return self.bytes_of(token).decode(errors="replace")


def chat_logprobs(tokens: Sequence[TokenLogprob], texts: TokenTexts) -> dict[str, Any]:
    """Return what a choice of a chat has as `logprobs`."""
    return {"content": [_of_chat(token, texts) for token in tokens], "refusal": None}


def completion_logprobs(
    tokens: Sequence[TokenLogprob], texts: TokenTexts, offset: int
) -> dict[str, Any]:
    """Return what a choice of a completion has as `logprobs`.

    offset: where the first token begins in the text, in characters.
    """
    own = [texts[token.token] for token in tokens]
    offsets = [offset + sum(map(len, own[:i])) for i in range(len(own))]
    return {
        "tokens": own,
        "token_logprobs": [_finite(token.logprob) for token in tokens],
        "top_logprobs": [{texts[t]: _finite(p) for t, p in token.top} for token in tokens],
        "text_offset": offsets,
    }


def _of_chat(token: TokenLogprob, texts: TokenTexts) -> dict[str, Any]:
    top = [_one(other, logprob, texts) for other, logprob in token.top]
    return {**_one(token.token, token.logprob, texts), "top_logprobs": top}


def _one(token: int, logprob: float, texts: TokenTexts) -> dict[str, Any]:
    return {
        "token": texts[token],
        "logprob": _finite(logprob),
        "bytes": list(texts.bytes_of(token)),
    }


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)


_FINISH = {"stop": "stop", "stop_string": "stop", "length": "length", "context": "length"}


@dataclass
class FinishedAnswer:
    """One answer from its beginning to its end."""

    text: str = ""
    tokens: list[TokenLogprob] = field(default_factory=list)
    done: Done | None = None


class ResponseBuilder(ABC):
    """The shape of the answers to one request.

    `seed` is mixchat's own field: where the request gave none, it is the one that was drawn.
    """

    prefix: str  # of the ID
    name: str  # of the object
    chunk_name: str

    def __init__(self, asked: ParsedRequest, model: str, texts: TokenTexts) -> None:
        self._asked, self._texts = asked, texts
        self._with_logprobs = asked.jobs[0].top_logprobs is not None
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
            "seed": asked.seed,
        }

    def whole(self, wholes: Sequence[FinishedAnswer]) -> dict[str, Any]:
        """Return the body of an answer that is sent at once."""
        done = [whole.done for whole in wholes if whole.done is not None]
        choices = [
            self._choice(number, whole.text, whole.tokens, _finish(whole.done))
            for number, whole in enumerate(wholes)
        ]
        return self._object(self.name, choices) | {"usage": self._usage(done)}

    def openings(self) -> list[dict[str, Any]]:
        """Return the chunks that come before all text."""
        return []

    def piece(self, number: int, delta: Delta) -> dict[str, Any]:
        """Return the chunk of a piece of text."""
        return self._chunk([self._piece(number, delta.text, delta.tokens, None)])

    def ending(self, number: int, done: Done) -> dict[str, Any]:
        """Return the last chunk of an answer."""
        return self._chunk([self._piece(number, "", (), _finish(done))])

    def usage(self, done: Sequence[Done]) -> dict[str, Any]:
        """Return the chunk of its own that has the counts of tokens."""
        return self._chunk([]) | {"usage": self._usage(done)}

    @abstractmethod
    def _choice(
        self, number: int, text: str, tokens: Sequence[TokenLogprob], finish: str | None
    ) -> dict[str, Any]:
        """Return a whole answer."""

    @abstractmethod
    def _piece(
        self, number: int, text: str, tokens: Sequence[TokenLogprob], finish: str | None
    ) -> dict[str, Any]:
        """Return a part of an answer; it has a reason to finish if it is the last."""

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        usage = {"usage": None} if self._asked.include_usage else {}
        return self._object(self.chunk_name, choices) | usage

    def _object(self, name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": name, "choices": choices}

    def _usage(self, done: Sequence[Done]) -> dict[str, Any]:
        """Return the counts: a prompt counts once, however many answers it has."""
        prompt = sum(len(job.prompt_ids) for job in self._asked.jobs[:: self._asked.n])
        generated = sum(each.generated_tokens for each in done)
        cached = min(prompt, sum(each.cached_tokens for each in done[:: self._asked.n]))
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": cached},
        }


class ChatResponses(ResponseBuilder):
    """The answers of /v1/chat/completions."""

    prefix, name, chunk_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def openings(self) -> list[dict[str, Any]]:
        """Return a chunk for each answer, which names its role."""
        delta = {"role": "assistant", "content": ""}
        return [
            self._chunk([self._with(number, {"delta": delta}, (), None)])
            for number in range(len(self._asked.jobs))
        ]

    def _choice(
        self, number: int, text: str, tokens: Sequence[TokenLogprob], finish: str | None
    ) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return self._with(number, {"message": message}, tokens, finish)

    def _piece(
        self, number: int, text: str, tokens: Sequence[TokenLogprob], finish: str | None
    ) -> dict[str, Any]:
        delta = {"content": text} if finish is None else {}
        return self._with(number, {"delta": delta}, tokens, finish)

    def _with(
        self,
        number: int,
        content: dict[str, Any],
        tokens: Sequence[TokenLogprob],
        finish: str | None,
    ) -> dict[str, Any]:
        wanted = self._with_logprobs and ("message" in content or tokens)
        logprobs = chat_logprobs(tokens, self._texts) if wanted else None
        return {"index": number, **content, "logprobs": logprobs, "finish_reason": finish}


class CompletionResponses(ResponseBuilder):
    """The answers of /v1/completions."""

    prefix, name, chunk_name = "cmpl", "text_completion", "text_completion"

    def __init__(self, asked: ParsedRequest, model: str, texts: TokenTexts) -> None:
        super().__init__(asked, model, texts)
        self._lengths = [0] * len(asked.jobs)  # of the tokens' texts so far

    def _choice(
        self, number: int, text: str, tokens: Sequence[TokenLogprob], finish: str | None
    ) -> dict[str, Any]:
        logprobs = None
        if self._with_logprobs:
            logprobs = completion_logprobs(tokens, self._texts, self._lengths[number])
            self._lengths[number] += sum(len(self._texts[token.token]) for token in tokens)
        return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": finish}

    _piece = _choice


def _finish(done: Done | None) -> str | None:
    return None if done is None else _FINISH[done.reason]


CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
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


def to_prometheus(stats: ServiceStats) -> str:
    """Return the counts as text."""
    lines = []
    for name, kind, count, about in _METRICS:
        full = f"mixchat_{name}"
        lines += [f"# HELP {full} {about}", f"# TYPE {full} {kind}"]
        lines += [f"{full} {getattr(stats, count)}"]
    return "\n".join(lines) + "\n"
