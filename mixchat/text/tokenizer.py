"""The interface of a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from mixchat.base.errors import PromptError

# A character in a template's text may stand for plain text, or for ids that are taken as they are.
Insert: TypeAlias = "str | tuple[int, ...]"


@dataclass(frozen=True)
class TokenBytes:
    """The bytes that each token adds to the UTF-8 of a text; none for control tokens.

    within: by id, of a token that follows others; first: of tokens that add other bytes where they
    begin a text, as those of SentencePiece lose a leading space there.
    """

    within: Sequence[bytes]
    first: Mapping[int, bytes]


class Tokenizer(Protocol):
    """Turns text into token ids and back; untrusted text never yields a control token.

    A control token (`</s>`, `<|im_end|>`) steers the model. Templates may write one, people may
    not: `encode` yields none for any text.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    adds_bos: bool  # whether the checkpoint wants BOS in front of plain text
    control_tokens: Mapping[str, int]

    def encode(self, text: str) -> list[int]:
        """Return the ids of untrusted text: no control token, no BOS.

        Raises `PromptError` where `text` is not valid Unicode.
        """
        ...

    def encode_template(self, text: str, inserts: Mapping[str, Insert] | None = None) -> list[int]:
        """Return the ids of trusted text: control tokens count, and no BOS is added.

        `inserts` maps single characters of `text` to what replaces them: a string is inserted as
        untrusted text, ids as they are. Raises `PromptError` as `encode` does.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids. Control and unknown ids are skipped; broken UTF-8 is U+FFFD."""
        ...

    def token_id(self, token: str) -> int | None:
        """Return the id of a control token by its text, None where there is no such token."""
        ...

    def token_bytes(self) -> TokenBytes:
        """Return the bytes of all tokens: those of ids, joined, are the UTF-8 of `decode(ids)`.

        That holds where they are valid UTF-8, and there are no control or unknown tokens.
        """
        ...


def require_unicode(text: str) -> None:
    """Raise `PromptError` where `text` holds half a surrogate pair, which no tokenizer accepts."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(
            f"the text is not valid Unicode: a lone surrogate at character {error.start}"
        ) from None
