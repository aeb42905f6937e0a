"""The bytes of each token of a tokenizer.json file."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from mixchat.text.detokenizer import TokenBytes

if TYPE_CHECKING:
    import tokenizers


def decoded_bytes(
    tokenizer: tokenizers.Tokenizer,
    ids: Sequence[int],
    byte_tokens: Mapping[int, int],
    anchor: Sequence[int],
) -> TokenBytes:
    """Return the bytes of `ids`, found by decoding each of them after other text and alone.

    `byte_tokens` has the tokens that stand for one byte, which may be part of a character. `anchor`
    has the ids of a short text.
    """
    text = tokenizer.decode(list(anchor))
    after = tokenizer.decode_batch([[*anchor, i] for i in ids], skip_special_tokens=False)
    alone = tokenizer.decode_batch([[i] for i in ids], skip_special_tokens=False)

    def exact(token_id: int, decoded: str) -> bytes:
        is_part = token_id in byte_tokens and byte_tokens[token_id] >= 0x80
        return bytes([byte_tokens[token_id]]) if is_part else decoded.encode()

    within = [exact(i, whole.removeprefix(text)) for i, whole in zip(ids, after, strict=True)]
    first = [exact(i, whole) for i, whole in zip(ids, alone, strict=True)]
    return TokenBytes(within, {i: first[n] for n, i in enumerate(ids) if first[n] != within[n]})


def byte_level_bytes(tokenizer: tokenizers.Tokenizer, ids: Sequence[int]) -> TokenBytes:
    """Return the bytes of `ids`, if each character of a token's name stands for a byte."""
    bytes_of = _byte_level_alphabet()

    def exact(piece: str) -> bytes:
        # An added token may have other characters, which are text.
        known = all(character in bytes_of for character in piece)
        return bytes(bytes_of[character] for character in piece) if known else piece.encode()

    return TokenBytes([exact(tokenizer.id_to_token(i) or "") for i in ids], {})


def with_controls(
    tokens: TokenBytes, controls: Collection[int], names: Mapping[int, bytes]
) -> TokenBytes:
    """Return the bytes of tokens, none for `controls`, some of which have `names`."""
    within = [b"" if i in controls else text for i, text in enumerate(tokens.within)]
    first = {i: text for i, text in tokens.first.items() if i not in controls}
    return TokenBytes(within, first, names)


def _byte_level_alphabet() -> dict[str, int]:
    """Return the byte of each character of GPT-2's alphabet.

    Bytes that print in Latin-1 stand for themselves, the others are U+0100 and on, in order.
    """
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unprinted = [byte for byte in range(0x100) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {
        chr(0x100 + number): byte for number, byte in enumerate(unprinted)
    }
