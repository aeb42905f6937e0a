"""Mistral's tokenizers and chat templates since V11, as mistral-common makes them."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import text_builders as build
from tokenizers import AddedToken, Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel

from mixchat.text.messages import Message
from mixchat.text.tool_call import Tool

SPECIAL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]"),
    *("[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    *("[TOOL_CONTENT]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]"),
    *("[MODEL_SETTINGS]", "[/MODEL_SETTINGS]"),
)


@dataclass(frozen=True)
class MistralText:
    """A version of Mistral's text, whose tokens are single bytes here."""

    version: str
    thinks: bool

    @property
    def special(self) -> list[str]:
        return [name for name in SPECIAL if self.thinks or "THINK" not in name]

    def template(self) -> str:
        """Return the chat template that mistral-common writes for this version."""
        from mistral_common.integrations.chat_templates import chat_templates
        from mistral_common.tokens.tokenizers.base import TokenizerVersion

        has_effort = self.version == "v15"
        return chat_templates.generate_chat_template(
            spm=False,
            tokenizer_version=TokenizerVersion(self.version),
            image_support=False,
            audio_support=False,
            thinking_support=self.thinks,
            default_system_prompt=None,
            plain_thinking_support=False,
            use_special_token_variables=True,
            model_settings_fields=frozenset({"reasoning_effort"}) if has_effort else None,
            reasoning_effort_values=("none", "high") if has_effort else None,
            reasoning_effort_default="none" if has_effort else None,
        )

    def write(self, directory: Path) -> Path:
        """Write a checkpoint's tokenizer, whose ids are those of `theirs`, and its template."""
        ids = {char: len(self.special) + byte for byte, char in _byte_characters().items()}
        first = {name: i for i, name in enumerate(self.special)}
        tokenizer = Tokenizer(models.BPE(vocab={**first, **ids}, merges=[]))
        tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in self.special])
        names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
        return build.write_checkpoint(directory, tokenizer, template=self.template(), **names)

    def theirs(self) -> Any:
        """Return mistral-common's tokenizer of conversations of this version."""
        from mistral_common.tokens.tokenizers import instruct
        from mistral_common.tokens.tokenizers.base import TokenizerVersion
        from mistral_common.tokens.tokenizers.model_settings_builder import (
            ModelSettingsBuilder,
            ReasoningEffortEnumBuilder,
        )
        from mistral_common.tokens.tokenizers.tekken import Tekkenizer

        effort: Any = {"default": "none", "values": ["none", "high"]}
        settings = ModelSettingsBuilder(reasoning_effort=ReasoningEffortEnumBuilder(**effort))
        tokenizer = Tekkenizer(
            [
                {"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode(), "token_str": None}
                for i in range(256)
            ],
            [
                {"rank": i, "token_str": name, "is_control": True}
                for i, name in enumerate(self.special)
            ],
            pattern=r"(?s:.)",
            vocab_size=256 + len(self.special),
            num_special_tokens=len(self.special),
            version=TokenizerVersion(self.version),
            model_settings_builder=settings if self.version == "v15" else None,
        )
        return getattr(instruct, f"InstructTokenizer{self.version.upper()}")(tokenizer)


def first_generations(file: Path) -> Any:
    """Return mistral-common's tokenizer of conversations with a file of V1 or V3."""
    from mistral_common.tokens.tokenizers import instruct
    from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

    tokenizer = SentencePieceTokenizer(str(file))
    return getattr(instruct, f"InstructTokenizer{tokenizer.version.value.upper()}")(tokenizer)


def their_ids(
    theirs: Any, messages: list[Message], tools: Sequence[Tool] = (), *, thinks: bool = False
) -> list[int]:
    """Return the ids of a conversation by a tokenizer of mistral-common."""
    from mistral_common.protocol.instruct.normalize import get_normalizer
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.protocol.instruct.tool_calls import Function
    from mistral_common.protocol.instruct.tool_calls import Tool as TheirTool

    request = ChatCompletionRequest(
        messages=[_their_message(message, thinks) for message in messages],
        tools=[TheirTool(function=Function(**t.to_json()["function"])) for t in tools] or None,
    )
    builder = theirs.tokenizer.model_settings_builder
    normalizer = get_normalizer(theirs.tokenizer.version, builder)
    normal = normalizer.from_chat_completion_request(request)
    return list(theirs.encode_instruct(normal).tokens)


def _their_message(message: Message, thinks: bool) -> Any:
    from mistral_common.protocol.instruct import messages as kinds
    from mistral_common.protocol.instruct.chunk import TextChunk, ThinkChunk
    from mistral_common.protocol.instruct.tool_calls import FunctionCall, ToolCall

    if message.role == "tool":
        return kinds.ToolMessage(content=message.content, tool_call_id=message.call_id)
    if message.role != "assistant":
        kind = {"system": kinds.SystemMessage, "user": kinds.UserMessage}[message.role]
        return kind(content=message.content)
    calls = [
        ToolCall(id=call.id, function=FunctionCall(name=call.name, arguments=call.arguments))
        for call in message.calls
    ]
    content: Any = message.content or None
    if message.thinking and thinks:
        texts = [TextChunk(text=message.content)] if message.content else []
        content = [ThinkChunk(thinking=message.thinking), *texts]
    return kinds.AssistantMessage(content=content, tool_calls=calls or None)


def _byte_characters() -> dict[int, str]:
    """Return the character that stands for each byte in byte-level vocabularies."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (byte for byte in range(256) if byte not in plain)
    moved = {byte: chr(256 + number) for number, byte in enumerate(others)}
    return {byte: chr(byte) for byte in plain} | moved


VERSIONS = {
    "v11": MistralText("v11", thinks=False),
    "v13": MistralText("v13", thinks=False),
    "v13 thinking": MistralText("v13", thinks=True),
    "v15": MistralText("v15", thinks=True),
}
