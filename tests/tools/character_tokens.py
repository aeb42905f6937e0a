"""The bytes of tokens that are code points, for doubles of tokenizers."""

from __future__ import annotations

from collections.abc import Collection

from mixchat.text.detokenizer import TokenBytes


class _CharacterBytes:
    """A sequence without its 1,114,112 entries. `hidden` tokens have no bytes."""

    def __init__(self, hidden: Collection[int]) -> None:
        self._hidden = hidden

    def __len__(self) -> int:
        return 0x110000

    def __getitem__(self, token: int) -> bytes:
        return b"" if token in self._hidden else chr(token).encode(errors="replace")


def character_bytes(hidden: Collection[int] = ()) -> TokenBytes:
    """Return the bytes of tokens, each of which is the character of its code point."""
    return TokenBytes(_CharacterBytes(hidden), {})  # type: ignore[arg-type]
