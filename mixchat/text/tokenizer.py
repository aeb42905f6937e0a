"""What a tokenizer is to the rest of mixchat, and which of a checkpoint's files makes one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeAlias

from mixchat.errors import CheckpointError
from mixchat.text.markup import is_mistral_v1
from mixchat.text.tokenizer_files import chat_template

# What a character in a template's text may stand for: plain text, or ids taken over as they are.
Insert: TypeAlias = "str | tuple[int, ...]"

SENTENCEPIECE_FILE = "tokenizer.model"
JSON_FILE = "tokenizer.json"


class Tokenizer(Protocol):
    """Text to token ids and back, with one promise about control tokens.

    A control token (`</s>`, `<|im_end|>`) steers the model. Templates may write one, people may
    not: whatever text `encode` is given, it yields none.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    adds_bos: bool  # whether the checkpoint wants BOS in front of plain text
    control_tokens: Mapping[str, int]

    def encode(self, text: str) -> list[int]:
        """The ids of a person's text: no control token, no BOS.

        Raises `PromptError` where `text` is not valid Unicode.
        """
        ...

    def encode_template(self, text: str, inserts: Mapping[str, Insert] | None = None) -> list[int]:
        """The ids of trusted text: control tokens in it are recognised, and no BOS is added.

        `inserts` says what single characters of `text` stand for: a string goes in as plain text,
        whatever it spells; ids go in as they are. Raises `PromptError` as `encode` does.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids. Control tokens and unknown ids are skipped, broken UTF-8 is U+FFFD."""
        ...

    def token_id(self, token: str) -> int | None:
        """The id of a control token by its text, None where there is no such control token."""
        ...


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of the checkpoint in `directory`, in this process.

    It may loop, or take all memory: but for tests, `CheckpointText` loads it inside a cage.

    SentencePiece's tokenizer.model is the original of Mistral's own models and goes first. A
    fine-tune that brings another chat template also brings control tokens, which tokenizer.json
    knows better. Raises `CheckpointError` where there is neither, or one cannot be read.
    """
    spm_file, json_file = directory / SENTENCEPIECE_FILE, directory / JSON_FILE
    template = chat_template(directory)
    foreign = template is not None and not is_mistral_v1(template.source)
    if json_file.exists() and (foreign or not spm_file.exists()):
        from mixchat.text.hf import JsonTokenizer

        return JsonTokenizer(json_file)
    if spm_file.exists():
        from mixchat.text.spm import SentencePieceTokenizer

        return SentencePieceTokenizer(spm_file)
    raise CheckpointError(f"{directory}: there is no {SENTENCEPIECE_FILE} and no {JSON_FILE}")
