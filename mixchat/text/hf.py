"""The tokenizer of a tokenizer.json file, run by the package tokenizers."""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixchat.base.errors import CheckpointError, short_message
from mixchat.base.files import read_json_object
from mixchat.text.detokenizer import TokenBytes
from mixchat.text.hf_bytes import byte_level_bytes, decoded_bytes, with_controls
from mixchat.text.tokenizer import Insert, Tokenizer, require_unicode, token_pattern
from mixchat.text.tokenizer_files import (
    MAX_TOKENIZER_FILE,
    AddedToken,
    parse_added_token,
    read_added_tokens,
    read_optional_json,
    read_special_tokens,
    require_size,
)

if TYPE_CHECKING:
    import tokenizers

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"  # noncharacters, which no text needs


class JsonTokenizer(Tokenizer):
    """A `Tokenizer` that gives each control token of tokenizer.json a secret name.

    The package finds an added token in any text that spells it. So each control token is renamed to
    a mark with a random number, which nobody can type. `<|im_end|>` is then plain text, and a
    template's own one is replaced by its mark. Ordinary text is encoded as by the original.
    """

    def __init__(self, file: Path) -> None:
        """Read `file` and its neighbours. Raises `CheckpointError` if one is damaged."""
        directory = file.parent
        require_size(file, MAX_TOKENIZER_FILE)
        spec = read_json_object(file)
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
        self._splice_id = _add_splice(self._tokenizer, self._splice)

        special = {t.content for t in controls if t.special or t.content in names.values()}
        self._shown_names = {
            i: name.encode() for name, i in self.control_tokens.items() if name not in special
        }
        words = [t.content for t in controls if t.single_word]
        self._controls = token_pattern(self._marks, whole_words=words)
        decoder = json.dumps(spec.get("decoder"))
        self._is_byte_level = "ByteLevel" in decoder
        self._byte_of = self._byte_tokens() if "ByteFallback" in decoder else {}

        # The tokens of a newline after an insert. If they are two, text after any token gets a
        # leading space, which is wrong for text that continues.
        self._newline = self._ids(self._splice + "\n")[1:]
        first = self._tokenizer.id_to_token(self._newline[0]) if self._newline else None
        self._leads_with_space = bool(first and first.startswith("\u2581"))

        self.bos_id = self._first_id(names.get("bos_token"), "<s>")
        self.eos_id = self._first_id(names.get("eos_token"), "</s>")
        settings = read_optional_json(directory / "tokenizer_config.json")
        self.adds_bos = self._adds_bos(settings.get("add_bos_token"))
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
            byte_level_bytes(self._tokenizer, ids)
            if self._is_byte_level
            else decoded_bytes(self._tokenizer, ids, self._byte_of, anchor=self._ids("a"))
        )
        return with_controls(tokens, set(self.control_tokens.values()), self._shown_names)

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
        runs = _split_at(self._ids(text), self._splice_id)
        ids = next(runs)
        for answer, run, line in zip(answers, runs, lines[1:], strict=True):
            head = len(self._newline) if line else 0
            if line and run[:head] != self._newline:
                return None
            ids += [*answer, *run[head:]]
        return ids

    def _byte_tokens(self) -> dict[int, int]:
        """Return the byte of each byte's token by its id, or nothing unless all 256 exist."""
        ids = [self._tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        known = {token: byte for byte, token in enumerate(ids) if token is not None}
        return known if len(known) == 256 else {}

    def _first_id(self, *tokens: str | None) -> int | None:
        known = self.control_tokens
        return next((known[token] for token in tokens if token and token in known), None)

    def _adds_bos(self, setting: object) -> bool:
        if self.bos_id is None or isinstance(setting, bool):
            return self.bos_id is not None and bool(setting)
        return self._tokenizer.encode("a", add_special_tokens=True).ids[:1] == [self.bos_id]


def _all_added(spec: dict[str, Any], file: Path, names: Iterable[str]) -> list[AddedToken]:
    """Return the added tokens of tokenizer.json, and others that only its neighbours name."""
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
        model["vocab"] = [_renamed_entry(entry, marks) for entry in vocab]
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


def _renamed_entry(entry: Any, marks: Mapping[str, str]) -> Any:
    if isinstance(entry, list) and entry and isinstance(entry[0], str):
        return [marks.get(entry[0], entry[0]), *entry[1:]]
    return entry


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


def _add_splice(tokenizer: tokenizers.Tokenizer, text: str) -> int:
    """Add the token that marks the place of inserted ids, and return its id."""
    from tokenizers import AddedToken as Added

    tokenizer.add_special_tokens([Added(text, normalized=False, special=True)])
    return _id_of(tokenizer, text)


def _id_of(tokenizer: tokenizers.Tokenizer, token: str) -> int:
    token_id = tokenizer.token_to_id(token)
    assert token_id is not None, token
    return token_id


def _split_at(ids: Iterable[int], separator: int) -> Iterator[list[int]]:
    run: list[int] = []
    for token_id in ids:
        if token_id == separator:
            yield run
            run = []
        else:
            run.append(token_id)
    yield run
