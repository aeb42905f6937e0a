"""Chat templates: their interface, and those that need no file."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from mixchat.text.messages import (
    Message,
    require_question,
    split_system,
    system_in_first_question,
)
from mixchat.text.thinking import ThinkingFormat
from mixchat.text.tokenizer import Insert, Tokenizer


class Template(Protocol):
    """Turns a conversation into the ids after which the model answers."""

    stop_ids: frozenset[int]  # any of these ends an answer
    continues_prompt: bool  # whether the answer's text continues the prompt's text
    thinking: ThinkingFormat | None  # None if the model does not think

    def encode(
        self, messages: Sequence[Message], variables: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Return the ids of the conversation, ready for the model to answer.

        `variables` are of those in `thinking`. Raises `PromptError` if the template cannot express
        the conversation.
        """
        ...


class InstructTemplate:
    """The format of Mistral's first instruct models (V1), built from ids, segment by segment.

    One BOS, then for each turn the ids of "[INST] question [/INST]", the ids of the answer, and
    EOS. Each segment is encoded alone, with SentencePiece's leading space, as in training. The same
    conversation as one string gives other ids. Source: mistral-common, `InstructTokenizerV1`.

    Hi, Hello: 1, 733 16289 28793 15359 733 28748 16289 28793, 22557, 2
    """

    continues_prompt = False
    thinking: ThinkingFormat | None = None

    def __init__(self, tokenizer: Tokenizer, *, stop_ids: Collection[int] = ()) -> None:
        self._tokenizer = tokenizer
        self.stop_ids = frozenset(stop_ids) | _optional(tokenizer.eos_id)

    def encode(
        self, messages: Sequence[Message], variables: Mapping[str, Any] | None = None
    ) -> list[int]:
        require_question(messages)
        ids = [*_optional(self._tokenizer.bos_id)]
        for message in system_in_first_question(messages):
            if message.role == "user":
                ids += self._tokenizer.encode(f"[INST] {message.content} [/INST]")
            else:
                answer = message.content_ids
                ids += self._tokenizer.encode(message.content) if answer is None else answer
                ids += _optional(self._tokenizer.eos_id)
        return ids


class CompletionTemplate:
    """The template of base models, which know no chat. All messages are joined into one text."""

    continues_prompt = True
    thinking: ThinkingFormat | None = None

    def __init__(
        self, tokenizer: Tokenizer, *, stop_ids: Collection[int] = (), add_bos: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._bos = _optional(tokenizer.bos_id) if add_bos else frozenset()
        self.stop_ids = frozenset(stop_ids) | _optional(tokenizer.eos_id)

    def encode(
        self, messages: Sequence[Message], variables: Mapping[str, Any] | None = None
    ) -> list[int]:
        system, rest = split_system(messages)
        if system:
            rest = [Message("user", f"{system}\n\n" if rest else system), *rest]
        # All of it is untrusted text, so each message is one character of the "template".
        inserts: dict[str, Insert] = {
            chr(0xF0000 + i): message.content if (ids := message.content_ids) is None else ids
            for i, message in enumerate(rest)
        }
        return [*self._bos, *self._tokenizer.encode_template("".join(inserts), inserts)]


def _optional(token_id: int | None) -> frozenset[int]:
    return frozenset() if token_id is None else frozenset({token_id})
