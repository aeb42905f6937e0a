"""The tokenizer of a SentencePiece file, tokenizer.model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from mixchat.base.errors import CheckpointError, short_message
from mixchat.base.files import read_bytes
from mixchat.text.detokenizer import TokenBytes
from mixchat.text.tokenizer import (
    Insert,
    Tokenizer,
    looks_like_markup,
    require_unicode,
    token_pattern,
)
from mixchat.text.tokenizer_files import (
    MAX_TOKENIZER_FILE,
    read_added_tokens,
    read_optional_json,
    read_special_tokens,
)


class SentencePieceTokenizer(Tokenizer):
    """A `Tokenizer` for a SentencePiece model and the tokens that a fine-tune added to it."""

    def __init__(self, file: Path) -> None:
        """Read `file` and its neighbours. Raises `CheckpointError` if one is damaged."""
        directory = file.parent
        data = read_bytes(file, max_bytes=MAX_TOKENIZER_FILE)
        model = _load(data, file)
        size = model.vocab_size()
        pieces = _vocabulary(model, file)
        added = {token.content: token.id for token in read_added_tokens(directory)}

        own = {piece: i for i, piece in enumerate(pieces) if model.is_control(i)}
        unknown = model.unk_id()
        fixed = {unknown, *own.values(), *(i for i in range(size) if model.is_byte(i))}
        suspects = {i for i, piece in enumerate(pieces) if looks_like_markup(piece)} - fixed
        declared = {i for i in added.values() if i < size} - fixed
        if suspects or declared:
            # SentencePiece finds user-defined pieces in any text, control pieces in none.
            typeable = _user_defined(data) & suspects
            if typeable | declared:
                model = _load(_make_control(data, typeable | declared), file)
                own |= {pieces[i]: i for i in typeable}

        self._model = model
        self._size = size
        self.control_tokens: Mapping[str, int] = {pieces[unknown]: unknown, **own, **added}
        self._controls = token_pattern(self.control_tokens)
        self._newline: list[int] = model.encode("\n")

        settings = read_optional_json(directory / "tokenizer_config.json")
        # With `legacy`, transformers' default for these files, text after a control token gets a
        # leading space, like text at the start.
        self._space_after_control = settings.get("legacy") is not False
        names = read_special_tokens(directory)
        self.vocab_size = max([size, *(i + 1 for i in added.values())])
        self.bos_id = self._special(names.get("bos_token"), model.bos_id())
        self.eos_id = self._special(names.get("eos_token"), model.eos_id())
        self.adds_bos = self.bos_id is not None and settings.get("add_bos_token") is not False
        self.token_bytes = self._all_bytes()

    def encode(self, text: str) -> list[int]:
        require_unicode(text)
        ids: list[int] = self._model.encode(text)
        return ids

    def encode_template(self, text: str, inserts: Mapping[str, Insert] | None = None) -> list[int]:
        require_unicode(text)
        inserts = inserts or {}
        plain = str.maketrans({key: v for key, v in inserts.items() if isinstance(v, str)})
        encoded = {key: v for key, v in inserts.items() if not isinstance(v, str)}
        ids: list[int] = []
        leading_space = True
        for segment, is_token in _split(text, self._controls, token_pattern(encoded)):
            if segment in encoded:
                ids.extend(encoded[segment])
                leading_space = False
            elif is_token:
                ids.append(self.control_tokens[segment])
                leading_space = self._space_after_control
            else:
                segment = segment.translate(plain)
                if leading_space:
                    ids.extend(self.encode(segment))
                    continue
                # SentencePiece omits the space only after other text, so a newline goes before.
                after = self.encode("\n" + segment)
                head = len(self._newline)
                starts = after[:head] == self._newline
                ids.extend(after[head:] if starts else self.encode(segment))
        return ids

    def _all_bytes(self) -> TokenBytes:
        within = [b""] * self.vocab_size
        controls = {*self.control_tokens.values()}
        for i in range(self._size):
            piece: str = self._model.id_to_piece(i)
            if i in controls:
                continue
            is_byte = self._model.is_byte(i)  # <0xNN>
            within[i] = (
                bytes.fromhex(piece[3:5]) if is_byte else piece.replace("\u2581", " ").encode()
            )
        spaced = [i for i, data in enumerate(within) if data.startswith(b" ")]
        alone: list[str] = self._model.decode([[i] for i in spaced])
        first = {i: text.encode() for i, text in zip(spaced, alone, strict=True)}
        return TokenBytes(within, {i: text for i, text in first.items() if text != within[i]})

    def _special(self, token: str | None, default: int) -> int | None:
        return self.control_tokens.get(token or "", default if default >= 0 else None)


def _load(data: bytes, file: Path) -> Any:
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(data)
    except (RuntimeError, ValueError, OSError) as error:
        raise CheckpointError(
            f"{file}: not a SentencePiece model ({short_message(error)})",
            hint="Fetch the model again; the file may be an error page or a Git LFS pointer.",
        ) from None
    return model


def _vocabulary(model: Any, file: Path) -> list[str]:
    try:
        pieces: list[str] = model.id_to_piece(list(range(model.vocab_size())))
    except UnicodeDecodeError:
        raise CheckpointError(f"{file}: a piece of its vocabulary is not UTF-8") from None
    return pieces


def _split(
    text: str, controls: re.Pattern[str], inserts: re.Pattern[str]
) -> Iterator[tuple[str, bool]]:
    """Yield the parts of `text`, each with whether it is a control token or an insert."""
    either = re.compile(f"{controls.pattern}|{inserts.pattern}")
    start = 0
    for match in either.finditer(text):
        if match.start() > start:
            yield text[start : match.start()], False
        yield match.group(), True
        start = match.end()
    if start < len(text):
        yield text[start:], False


# The file is one protocol buffer, sentencepiece_model.proto. Field 1, repeated, is a piece, and a
# piece's field 3 is its type. The last value of a field counts, so a field is changed by appending
# another.
_USER_DEFINED = 4
_CONTROL = b"\x18\x03"  # field 3, varint, type CONTROL


def _user_defined(data: bytes) -> set[int]:
    ids = set()
    for index, (_, start, end) in enumerate(_pieces(data)):
        types = [
            data[value]
            for number, _, value, value_end in _fields(data, start, end)
            if number == 3 and value_end - value == 1
        ]
        if types[-1:] == [_USER_DEFINED]:
            ids.add(index)
    return ids


def _make_control(data: bytes, ids: Set[int]) -> bytes:
    """Return the same model with the pieces of `ids` as control pieces."""
    out = bytearray()
    copied = 0
    for index, (outer, start, end) in enumerate(_pieces(data)):
        if index in ids:
            piece = data[start:end] + _CONTROL
            out += data[copied:outer] + b"\x0a" + _varint(len(piece)) + piece
            copied = end
    return bytes(out + data[copied:])


def _pieces(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield the start of each piece's field, and the start and end of its bytes."""
    for number, outer, start, end in _fields(data, 0, len(data)):
        if number == 1:
            yield outer, start, end


def _fields(data: bytes, position: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield the number, start, value's start and value's end of each field of a message."""
    while position < end:
        outer = position
        key, position = _read_varint(data, position)
        wire_type = key & 7
        start = position
        if wire_type == 0:
            _, position = _read_varint(data, position)
        elif wire_type == 2:
            length, start = _read_varint(data, position)
            position = start + length
        else:
            position += 8 if wire_type == 1 else 4
        yield key >> 3, outer, start, position


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
