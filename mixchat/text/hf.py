"""The tokenizer of a tokenizer.json file, run by the package tokenizers."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixchat.base.errors import CheckpointError, short_message
from mixchat.base.files import read_json_object
from mixchat.text.detokenizer import TokenBytes
from mixchat.text.tokenizer import Insert, Tokenizer, require_unicode, token_pattern
from mixchat.text.tokenizer_files import (
    MAX_TOKENIZER_FILE,
    AddedToken,
    parse_added_token,
    read_added_tokens,
    read_optional_json,
    read_special_tokens,
)

if TYPE_CHECKING:
    import tokenizers

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"  # Unicode noncharacters, which no text needs


class JsonTokenizer(Tokenizer):
    """A `Tokenizer` that gives each control token of tokenizer.json a secret name.

    The package finds an added token in any text that spells it. So each control token is renamed to
    a mark with a random number, which nobody can type. `<|im_end|>` is then plain text, and a
    template's own one is replaced by its mark. Ordinary text is encoded as by the original.
    """

    def __init__(self, file: Path) -> None:
        """Read `file` and its neighbours. Raises `CheckpointError` if one is damaged."""
        from tokenizers import AddedToken as Added

        directory = file.parent
        spec = read_json_object(file, max_bytes=MAX_TOKENIZER_FILE)
        names = read_special_tokens(directory)
        added = _all_added(spec, file, names.values())
        controls = [t for t in added if t.is_control or t.content in names.values()]

        secret = secrets.token_hex(8)
        self._marks = {t.content: f"{_OPEN}{secret}.{n}{_CLOSE}" for n, t in enumerate(controls)}
        self._splice = f"{_OPEN}{secret}{_CLOSE}"
        self._tokenizer = _build(_renamed(spec, added, self._marks), file)
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        self.control_tokens: Mapping[str, int] = {
            token: _id_of(self._tokenizer, mark) for token, mark in self._marks.items()
        }
        # The token that marks the place of inserted ids.
        splice = Added(self._splice, normalized=False, special=True)
        self._tokenizer.add_special_tokens([splice])
        self._splice_id = _id_of(self._tokenizer, self._splice)

        special = {t.content for t in controls if t.special or t.content in names.values()}
        self._shown_names = {
            i: name.encode() for name, i in self.control_tokens.items() if name not in special
        }
        words = [t.content for t in controls if t.single_word]
        self._controls = token_pattern(self._marks, whole_words=words)
        decoder = json.dumps(spec.get("decoder"))
        self._is_byte_level = "ByteLevel" in decoder
        self._byte_of: dict[int, int] = {}
        if "ByteFallback" in decoder:
            ids = [self._tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
            known = {token: byte for byte, token in enumerate(ids) if token is not None}
            # If a vocabulary lacks some of the 256 bytes, it uses none of them.
            self._byte_of = known if len(known) == 256 else {}

        # The tokens of a newline after an insert. If there are two, text after a token gets a
        # leading space. That is wrong for text that continues.
        self._newline = self._ids(self._splice + "\n")[1:]
        first = self._tokenizer.id_to_token(self._newline[0]) if self._newline else None
        self._leads_with_space = bool(first and first.startswith("\u2581"))

        self.bos_id = self._first_id(names.get("bos_token"), "<s>")
        self.eos_id = self._first_id(names.get("eos_token"), "</s>")
        settings = read_optional_json(directory / "tokenizer_config.json")
        adds_bos = settings.get("add_bos_token")
        if not isinstance(adds_bos, bool):
            first_id = self._tokenizer.encode("a", add_special_tokens=True).ids[:1]
            adds_bos = first_id == [self.bos_id]
        self.adds_bos = self.bos_id is not None and adds_bos
        self.token_bytes = self._all_bytes()

    def encode(self, text: str) -> list[int]:
        require_unicode(text)
        return self._ids(text)

    def encode_template(self, text: str, inserts: Mapping[str, Insert] | None = None) -> list[int]:
        inserts = inserts or {}
        plain = str.maketrans({key: v for key, v in inserts.items() if isinstance(v, str)})
        encoded = {key: v for key, v in inserts.items() if not isinstance(v, str)}
        text = self._controls.sub(lambda match: self._marks[match.group()], text)
        pattern = token_pattern(encoded)
        answers = [encoded[key] for key in pattern.findall(text)]
        segments = [segment.translate(plain) for segment in pattern.split(text)]
        for segment in segments:
            require_unicode(segment)
        ids = self._spliced(segments, answers, continued=self._leads_with_space)
        return ids if ids is not None else self._spliced(segments, answers, continued=False) or []

    def _all_bytes(self) -> TokenBytes:
        ids = range(self.vocab_size)
        tokens = (
            _byte_level_bytes(self._tokenizer, ids)
            if self._is_byte_level
            else _decoded_bytes(self._tokenizer, ids, self._byte_of, anchor=self._ids("a"))
        )
        controls = set(self.control_tokens.values())
        within = [b"" if i in controls else data for i, data in enumerate(tokens.within)]
        first = {i: data for i, data in tokens.first.items() if i not in controls}
        return TokenBytes(within, first, self._shown_names)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _spliced(
        self, segments: list[str], answers: list[tuple[int, ...]], *, continued: bool
    ) -> list[int] | None:
        """Encode `segments` as one text with `answers` between them.

        With `continued` a part after an answer gets no leading space, because it is encoded after a
        newline. Returns None if the newline's tokens cannot be separated from the part's.
        """
        lines = [
            continued and segment != "" and not segment.startswith(_OPEN) for segment in segments
        ]
        text = segments[0] + "".join(
            self._splice + "\n" * line + segment
            for segment, line in zip(segments[1:], lines[1:], strict=True)
        )
        runs: list[list[int]] = [[]]
        for token_id in self._ids(text):
            if token_id == self._splice_id:
                runs.append([])
            else:
                runs[-1].append(token_id)
        ids = runs[0]
        for answer, run, line in zip(answers, runs[1:], lines[1:], strict=True):
            head = len(self._newline) if line else 0
            if line and run[:head] != self._newline:
                return None
            ids += [*answer, *run[head:]]
        return ids

    def _first_id(self, *tokens: str | None) -> int | None:
        known = self.control_tokens
        return next((known[token] for token in tokens if token and token in known), None)


def _all_added(spec: dict[str, Any], file: Path, names: Iterable[str]) -> list[AddedToken]:
    """Return the added tokens of tokenizer.json, and those that only the other files name."""
    entries = spec.get("added_tokens") or []
    if not isinstance(entries, list):
        raise CheckpointError(f"{file}: added_tokens is not a list")
    added = {}
    for entry in entries:
        token_id = entry.get("id") if isinstance(entry, dict) else None
        token = parse_added_token(token_id if isinstance(token_id, int) else -1, entry, file)
        added[token.content] = token
    for token in read_added_tokens(file.parent):
        added.setdefault(token.content, token)
    for content in names:
        next_id = max((token.id for token in added.values()), default=-1) + 1
        added.setdefault(content, AddedToken(next_id, content, special=True))
    return list(added.values())


def _renamed(
    spec: dict[str, Any], added: Iterable[AddedToken], marks: Mapping[str, str]
) -> dict[str, Any]:
    """Return the file's content with the tokens in `marks` renamed, in the vocabulary too.

    A model that takes whole words from its vocabulary could still yield one that is not renamed.
    """
    model = dict(spec["model"]) if isinstance(spec.get("model"), dict) else {}
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        model["vocab"] = {marks.get(piece, piece): i for piece, i in vocab.items()}
    elif isinstance(vocab, list):
        model["vocab"] = [
            [marks.get(entry[0], entry[0]), *entry[1:]]
            if isinstance(entry, list) and entry and isinstance(entry[0], str)
            else entry
            for entry in vocab
        ]
    if isinstance(model.get("merges"), list):
        prefix = model.get("continuing_subword_prefix") or ""
        model["merges"] = [m for m in model["merges"] if not _touches(m, prefix, marks)]
    unknown = model.get("unk_token")
    if isinstance(unknown, str):
        model["unk_token"] = marks.get(unknown, unknown)
    tokens = [
        asdict(token) | {"content": marks.get(token.content, token.content)} for token in added
    ]
    return {**spec, "model": model, "added_tokens": tokens, "truncation": None, "padding": None}


def _touches(merge: Any, prefix: str, marks: Mapping[str, str]) -> bool:
    """Return whether a merge (`"a b"` or `["a", "b"]`) yields or uses a renamed token."""
    pair = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(p, str) for p in pair):
        return False
    first, second = pair
    return first in marks or second in marks or first + second.removeprefix(prefix) in marks


def _build(spec: dict[str, Any], file: Path) -> tokenizers.Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(json.dumps(spec))
    except BaseException as error:
        # A panic inside the package is not an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(
            f"{file}: not a tokenizer that can be used ({short_message(error)})"
        ) from None


def _id_of(tokenizer: tokenizers.Tokenizer, token: str) -> int:
    token_id = tokenizer.token_to_id(token)
    assert token_id is not None, token
    return token_id


def _decoded_bytes(
    tokenizer: tokenizers.Tokenizer,
    ids: Sequence[int],
    byte_tokens: Mapping[int, int],
    anchor: Sequence[int],
) -> TokenBytes:
    """Return the bytes of `ids`, by decoding each id after other text and alone.

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


def _byte_level_bytes(tokenizer: tokenizers.Tokenizer, ids: Sequence[int]) -> TokenBytes:
    """Return the bytes of `ids`, if each character of a token's name stands for a byte."""
    # GPT-2's alphabet: a byte that prints in Latin-1 stands for itself, the others are U+0100 and
    # on, in order.
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unprinted = [byte for byte in range(0x100) if byte not in printing]
    bytes_of = {chr(byte): byte for byte in printing} | {
        chr(0x100 + number): byte for number, byte in enumerate(unprinted)
    }

    def exact(piece: str) -> bytes:
        # An added token may have other characters, which are text.
        known = all(character in bytes_of for character in piece)
        return bytes(bytes_of[character] for character in piece) if known else piece.encode()

    return TokenBytes([exact(tokenizer.id_to_token(i) or "") for i in ids], {})
