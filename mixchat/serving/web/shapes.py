"""Answers in the shapes of OpenAI: whole ones and chunks, of a chat and of a completion."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from mixchat.serving.requests.options import Asked
from mixchat.serving.service import Delta, Done, TokenLogprob
from mixchat.serving.web.answers import Whole
from mixchat.serving.web.logprobs import TokenTexts, chat_logprobs, completion_logprobs

_FINISH = {"stop": "stop", "stop_string": "stop", "length": "length", "context": "length"}


class Shape(ABC):
    """The shape of the answers to one request.

    `seed` is mixchat's own field: where the request gave none, it is the one that was drawn.
    """

    prefix: str  # of the ID
    name: str  # of the object
    chunk_name: str

    def __init__(self, asked: Asked, model: str, texts: TokenTexts) -> None:
        self._asked, self._texts = asked, texts
        self._with_logprobs = asked.jobs[0].top_logprobs is not None
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
            "seed": asked.seed,
        }

    def whole(self, wholes: Sequence[Whole]) -> dict[str, Any]:
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


class ChatShape(Shape):
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


class CompletionShape(Shape):
    """The answers of /v1/completions."""

    prefix, name, chunk_name = "cmpl", "text_completion", "text_completion"

    def __init__(self, asked: Asked, model: str, texts: TokenTexts) -> None:
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
