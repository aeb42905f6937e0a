"""Chat templates: their interface, and those that need no file."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Protocol

from mixchat.text.messages import (
    Message,
    Variables,
    require_question,
    split_system,
    system_in_question,
)
from mixchat.text.thinking import ThinkingFormat
from mixchat.text.tokenizer import Insert, Tokenizer
from mixchat.text.tool_call import Tool
from mixchat.text.tool_formats import MISTRAL, ToolFormat


class Template(Protocol):
    """Turns a conversation into the ids after which the model answers."""

    stop_ids: frozenset[int]  # any of these ends an answer
    continues_prompt: bool  # whether the answer's text continues the prompt's text
    thinking: ThinkingFormat | None  # None if the model does not think
    tools: ToolFormat | None  # None if the template knows no tools

    def encode(
        self, messages: Sequence[Message], variables: Variables = None, tools: Sequence[Tool] = ()
    ) -> list[int]:
        """Return the ids of the conversation, ready for the model to answer.

        `variables` are some of those that `thinking` lists. `tools` may be called. A template that
        knows none takes neither tools nor calls (see `in_plain_text`). Raises `PromptError` if the
        template cannot express the conversation.
        """


class InstructTemplate:
    """The format of Mistral's instruct models, built from ids, segment by segment.

    One BOS, then for each turn the ids of the question, the ids of the answer, and EOS. Each
    segment is encoded alone, with SentencePiece's leading space, as in training. If the
    conversation were encoded as one string, the ids would differ. The first models (V1) take
    "[INST] question [/INST]" as one text. Later ones have tokens for [INST] and [/INST], and the
    system text in the last question. Source: mistral-common, `InstructTokenizerV1` and
    `InstructTokenizerV3`.

    V1: Hi, Hello: 1, 733 16289 28793 15359 733 28748 16289 28793, 22557, 2
    V3: Hi, Hello: 1, 3 16127 4, 23325, 2
    """

    continues_prompt = False
    thinking: ThinkingFormat | None = None

    def __init__(self, tokenizer: Tokenizer, *, stop_ids: Collection[int] = ()) -> None:
        self._tokenizer = tokenizer
        self.stop_ids = frozenset(stop_ids) | _optional(tokenizer.eos_id)
        knows_tools = "[AVAILABLE_TOOLS]" in tokenizer.control_tokens
        self.tools = MISTRAL if knows_tools else None

    def encode(
        self, messages: Sequence[Message], variables: Variables = None, tools: Sequence[Tool] = ()
    ) -> list[int]:
        require_question(messages)
        placed = system_in_question(MISTRAL.with_its_ids(messages), 0 if self._is_first else -1)
        last_question = max(i for i, message in enumerate(placed) if message.role == "user")
        ids = [*_optional(self._tokenizer.bos_id)]
        known = self._tokenizer.control_tokens
        for index, message in enumerate(placed):
            if message.role == "user":
                if tools and index == last_question:
                    functions = [
                        {
                            "type": "function",
                            "function": {
                                "name": tool.name,
                                "description": tool.description or "",
                                "parameters": dict(tool.parameters or {}),
                            },
                        }
                        for tool in tools
                    ]
                    ids += self._between("[AVAILABLE_TOOLS]", functions, "[/AVAILABLE_TOOLS]")
                if self._is_first:
                    ids += self._tokenizer.encode(f"[INST] {message.content} [/INST]")
                else:
                    begin, end = map(known.__getitem__, ("[INST]", "[/INST]"))
                    ids += [begin, *self._tokenizer.encode(message.content), end]
            elif message.role == "tool":
                content: object = message.content
                with suppress(ValueError, RecursionError):
                    content = json.loads(message.content)
                result = {"content": content, "call_id": message.call_id}
                ids += self._between("[TOOL_RESULTS]", result, "[/TOOL_RESULTS]")
            elif message.calls:
                calls = [{**call.to_json()["function"], "id": call.id} for call in message.calls]
                ids += self._between("[TOOL_CALLS]", calls, "</s>")
            else:
                answer = message.content_ids
                text = message.content if self._is_first else message.content.rstrip(" ")
                ids += self._tokenizer.encode(text) if answer is None else answer
                ids += _optional(self._tokenizer.eos_id)
        return ids

    @property
    def _is_first(self) -> bool:
        return "[INST]" not in self._tokenizer.control_tokens

    def _between(self, begin: str, value: object, end: str) -> list[int]:
        """Return the ids of a value's JSON between two control tokens."""
        text = json.dumps(value, ensure_ascii=False)
        known = self._tokenizer.control_tokens
        return [known[begin], *self._tokenizer.encode(text), known[end]]


class CompletionTemplate:
    """The template of base models, which know no chat. All messages are joined into one text."""

    continues_prompt = True
    thinking: ThinkingFormat | None = None
    tools: ToolFormat | None = None

    def __init__(
        self, tokenizer: Tokenizer, *, stop_ids: Collection[int] = (), add_bos: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._bos = _optional(tokenizer.bos_id) if add_bos else frozenset()
        self.stop_ids = frozenset(stop_ids) | _optional(tokenizer.eos_id)

    def encode(
        self, messages: Sequence[Message], variables: Variables = None, tools: Sequence[Tool] = ()
    ) -> list[int]:
        system, talk = split_system(messages)
        if system:
            talk = [Message("user", f"{system}\n\n" if talk else system), *talk]
        # All of the text is untrusted, so each message is an insert, one character of the
        # "template".
        inserts: dict[str, Insert] = {
            chr(0xF0000 + i): message.content if (ids := message.content_ids) is None else ids
            for i, message in enumerate(talk)
        }
        return [*self._bos, *self._tokenizer.encode_template("".join(inserts), inserts)]


def _optional(token_id: int | None) -> frozenset[int]:
    return frozenset() if token_id is None else frozenset({token_id})
