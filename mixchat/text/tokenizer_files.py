"""Reads the small files next to a tokenizer, with its settings, added tokens and chat template."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixchat.base.errors import CheckpointError, short_message
from mixchat.base.files import read_bytes, read_json_object
from mixchat.text.tokenizer import looks_like_markup

# Bytes of a file. Real chat templates have less than 100 KB, a vocabulary of 256,000 has 33 MB.
MAX_TEMPLATE_FILE = 1_000_000
MAX_SETTINGS_FILE = 16_000_000
MAX_TOKENIZER_FILE = 64_000_000
_MAX_TOKENS = 1_000_000  # of a vocabulary, because tables have an entry for each


@dataclass(frozen=True)
class AddedToken:
    """A token that a checkpoint adds to its vocabulary, with flags of the package tokenizers."""

    id: int
    content: str
    special: bool
    lstrip: bool = False  # removes the white space before the token
    rstrip: bool = False  # removes the white space after the token
    single_word: bool = False  # requires white space or punctuation there
    normalized: bool = False  # looks for the token in the normalized text

    @property
    def is_control(self) -> bool:
        """Return whether untrusted text must not yield this token."""
        return self.special or looks_like_markup(self.content)


@dataclass(frozen=True)
class ChatTemplate:
    """The source of a Jinja chat template, and its file."""

    source: str
    file: Path


def read_optional_json(file: Path) -> dict[str, Any]:
    """Read a JSON object, {} without a file. Raises `CheckpointError` if it is too large."""
    return read_json_object(file, max_bytes=MAX_SETTINGS_FILE) if file.exists() else {}


def template_file(directory: Path) -> Path:
    """Return the file that holds the chat template, if there is one."""
    file = directory / "chat_template.jinja"
    return file if file.exists() else directory / "tokenizer_config.json"


def read_chat_template(directory: Path) -> ChatTemplate | None:
    """Return the chat template of a checkpoint, None without one.

    As in transformers, the file chat_template.jinja precedes tokenizer_config.json, in which the
    template is a string, or the one named "default" in a list. Raises `CheckpointError`.
    """
    file = template_file(directory)
    if file.suffix == ".jinja":
        data = read_bytes(file, max_bytes=MAX_TEMPLATE_FILE)
        try:
            return ChatTemplate(data.decode("utf-8"), file)
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{file}: not UTF-8 text ({error.reason})") from None
    value = read_optional_json(file).get("chat_template")
    if isinstance(value, list):
        named = [e for e in value if isinstance(e, dict) and isinstance(e.get("name"), str)]
        value = {entry.get("name"): entry.get("template") for entry in named}
    if isinstance(value, dict):
        if "default" not in value:
            raise CheckpointError(f"{file}: none of its chat templates is named 'default'")
        value = value["default"]
    if value is None:
        return None
    if not isinstance(value, str):
        raise CheckpointError(f"{file}: chat_template is not text")
    if len(value) > MAX_TEMPLATE_FILE:
        size = f"{len(value) / 1e6:.1f} MB, mixchat reads at most {MAX_TEMPLATE_FILE / 1e6:.0f} MB"
        raise CheckpointError(f"{file}: the chat template has {size}")
    return ChatTemplate(value, file)


def read_special_tokens(directory: Path) -> dict[str, str]:
    """Return `bos_token`, `eos_token` and so on, each with its text. Raises `CheckpointError`.

    tokenizer_config.json precedes special_tokens_map.json. In both files a token is a string or an
    object with `content`.
    """
    tokens: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        for key, value in read_optional_json(directory / name).items():
            text = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(text, str) and text:
                tokens[key] = text
    return tokens


def read_added_tokens(directory: Path) -> list[AddedToken]:
    """Return the tokens of added_tokens.json and of tokenizer_config.json, ordered by id.

    Raises `CheckpointError` if they are not tables of ids and tokens.
    """
    tokens: dict[int, AddedToken] = {}
    file = directory / "added_tokens.json"
    for content, token_id in read_optional_json(file).items():
        if type(token_id) is not int or not 0 <= token_id < _MAX_TOKENS or not content:
            raise CheckpointError(f"{file}: the token {content!r:.80} has the id {token_id!r:.80}")
        tokens[token_id] = AddedToken(token_id, content, looks_like_markup(content))
    file = directory / "tokenizer_config.json"
    decoder = read_optional_json(file).get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise CheckpointError(f"{file}: added_tokens_decoder is not an object")
    for key, entry in decoder.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 10 and int(key) < _MAX_TOKENS):
            raise CheckpointError(f"{file}: added_tokens_decoder has the id {short_message(key)!r}")
        tokens[int(key)] = parse_added_token(int(key), entry, file)
    return [tokens[token_id] for token_id in sorted(tokens)]


def parse_added_token(token_id: int, entry: object, file: Path) -> AddedToken:
    """Return an added token from its entry in tokenizer.json or tokenizer_config.json.

    Raises `CheckpointError`, which names `file`, if `entry` is not an object with `content`.
    """
    content = entry.get("content") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(content, str) or not content:
        raise CheckpointError(f"{file}: the added token {token_id} has no text")
    flags = ("special", "lstrip", "rstrip", "single_word", "normalized")
    return AddedToken(token_id, content, **{flag: bool(entry.get(flag, False)) for flag in flags})
