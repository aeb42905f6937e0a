"""How a conversation is put to the model: Mistral's instruct format, or plain completion.

A checkpoint that brings a template of its own is served by `jinja_template`; `load_template` knows
which of the three is right.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

from mixchat.errors import CheckpointError
from mixchat.text.jinja_template import JinjaTemplate
from mixchat.text.markup import is_mistral_v1
from mixchat.text.messages import (
    Message,
    Role,
    Template,
    require_question,
    split_system,
    system_in_first_question,
)
from mixchat.text.tokenizer import SENTENCEPIECE_FILE, Insert, Tokenizer
from mixchat.text.tokenizer_files import (
    ChatTemplate,
    chat_template,
    read_optional_json,
    special_tokens,
)

__all__ = [
    "CompletionTemplate",
    "InstructTemplate",
    "JinjaTemplate",
    "Message",
    "Role",
    "Template",
    "load_template",
]

# Tokens that close a turn, in the chat formats that fine-tunes use.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")


class InstructTemplate:
    """The format of Mistral's first instruct models (V1), built from ids, segment by segment.

    One BOS, then for each turn the ids of "[INST] question [/INST]", those of the answer, and EOS.
    Each segment is encoded by itself, with SentencePiece's leading space, because that is what the
    models were trained on; the same conversation as one string gives other ids. Source:
    mistral-common, `InstructTokenizerV1`.

    Hi, Hello: 1, 733 16289 28793 15359 733 28748 16289 28793, 22557, 2
    """

    continues_prompt = False

    def __init__(self, tokenizer: Tokenizer, *, stop_ids: Collection[int] = ()) -> None:
        self._tokenizer = tokenizer
        self.stop_ids = frozenset(stop_ids) | _optional(tokenizer.eos_id)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        require_question(messages)
        ids = [*_optional(self._tokenizer.bos_id)]
        for message in system_in_first_question(messages):
            if message.role == "user":
                ids += self._tokenizer.encode(f"[INST] {message.content} [/INST]")
            else:
                answer = message.ids
                ids += self._tokenizer.encode(message.content) if answer is None else answer
                ids += _optional(self._tokenizer.eos_id)
        return ids


class CompletionTemplate:
    """For base models, which know no chat: the text of all messages, one behind the other."""

    continues_prompt = True

    def __init__(
        self, tokenizer: Tokenizer, *, stop_ids: Collection[int] = (), add_bos: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._bos = _optional(tokenizer.bos_id) if add_bos else frozenset()
        self.stop_ids = frozenset(stop_ids) | _optional(tokenizer.eos_id)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        system, rest = split_system(messages)
        if system:
            rest = [Message("user", f"{system}\n\n" if rest else system), *rest]
        # All of it is people's text: each message is one character of the "template".
        inserts: dict[str, Insert] = {
            chr(0xF0000 + i): message.content if message.ids is None else message.ids
            for i, message in enumerate(rest)
        }
        return [*self._bos, *self._tokenizer.encode_template("".join(inserts), inserts)]


def load_template(
    directory: Path,
    tokenizer: Tokenizer,
    *,
    eos_token_ids: Sequence[int] = (),
    kind: Literal["instruct"] | None = None,
) -> Template:
    """The template of the checkpoint in `directory`, whose tokenizer is `tokenizer`.

    It runs in this process: but for tests, `CheckpointText` loads it inside a cage.

    `eos_token_ids` are those of config.json. A checkpoint without a chat template is taken for a
    base model; `kind="instruct"` says that it, or any other, is to be asked in Mistral's format.
    Raises `CheckpointError` where the template, or a file beside it, is damaged.
    """
    stop_ids = {*eos_token_ids, *_generation_eos(directory)} | _optional(tokenizer.eos_id)
    template = chat_template(directory)
    if kind == "instruct" or (template and _is_instruct(template, directory, tokenizer)):
        return InstructTemplate(tokenizer, stop_ids=stop_ids)
    if template is None:
        return CompletionTemplate(tokenizer, stop_ids=stop_ids, add_bos=tokenizer.adds_bos)
    ends = (tokenizer.token_id(token) for token in _TURN_ENDS if token in template.source)
    return JinjaTemplate(
        template,
        tokenizer,
        variables=_variables(directory, tokenizer),
        stop_ids=stop_ids.union(i for i in ends if i is not None),
    )


def _is_instruct(template: ChatTemplate, directory: Path, tokenizer: Tokenizer) -> bool:
    # From its third generation on, [INST] is a control token with other rules for spaces.
    return (
        is_mistral_v1(template.source)
        and (directory / SENTENCEPIECE_FILE).exists()
        and tokenizer.token_id("[INST]") is None
    )


def _variables(directory: Path, tokenizer: Tokenizer) -> dict[str, str]:
    """The special tokens by name, as transformers hands them to a chat template."""
    by_id = {token_id: token for token, token_id in tokenizer.control_tokens.items()}
    defaults = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    known = {name: by_id[i] for name, i in defaults.items() if i in by_id}
    return {**known, **special_tokens(directory)}


def _generation_eos(directory: Path) -> list[int]:
    """The ids in generation_config.json that end an answer. Raises `CheckpointError`."""
    file = directory / "generation_config.json"
    value = read_optional_json(file).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(i) is not int or i < 0 for i in ids):
        raise CheckpointError(f"{file}: eos_token_id is {value!r}, no id and no list of ids")
    return ids


def _optional(token_id: int | None) -> frozenset[int]:
    return frozenset() if token_id is None else frozenset({token_id})
