"""The tokenizer, chat template and settings of a model in GGUF, as the files of a checkpoint.

The metadata has the vocabulary, but only a name for the rules that split a text into words. All of
it is untrusted, so the files are written here, but not used here.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from math import isfinite
from typing import Any

from mixchat.base.errors import CheckpointError

_KEY = "tokenizer.ggml."
# Types of tokens, as SentencePiece numbers them.
_NORMAL = 1
_UNKNOWN = 2
_CONTROL = 3
_USER_DEFINED = 4
_BYTE = 6
_TYPES = range(1, 7)
_SCORE_MAX = 3.4028234663852886e38  # of fp32
_PIECES = {"unk": 45, "bos": 46, "eos": 47, "pad": 48}  # fields of the model's trainer
_NAMES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_ENDS = ("eos", "eot", "eom")  # of an answer
# llama.cpp's converter copies these from generation_config.json.
_SAMPLING = {
    "temperature": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}

_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n%s]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = _SUFFIX + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s|" + _REST % ""
_MARKED_WORDS = (  # words, which include combining accents
    _SUFFIX
    + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    + r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}?"
    r"|\p{N}{1,3}|" + _REST % "/"
)
# The cased letters of an older Unicode, as DeepSeek's tokenizer.json lists them.
_CASED_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1"
    "\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5"
    "\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
    "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3"
    "\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115"
    "\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149"
    "\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06"
    "\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    "\U0001e900-\U0001e943"
)
_DEEPSEEK = (
    r"[\r\n]",
    rf"\s?[{_CASED_LETTERS}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
)
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|"
    + _REST % "/"
)
_GPT2: dict[str, Any] = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": True,
}
_DIGITS = {"type": "Digits", "individual_digits": True}


def _split(*patterns: str, digits: bool = False) -> list[dict[str, Any]]:
    """Return the rules that split a text by each pattern in turn, and then into single digits."""
    splits = [
        {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
        for regex in patterns
    ]
    return [*splits, *([_DIGITS] if digits else []), {**_GPT2, "use_regex": False}]


# The rules that split a text, by llama.cpp's names for them.
_SPLITS: dict[str, list[dict[str, Any]]] = {
    **{name: [_GPT2] for name in ("gpt-2", "olmo", "mellum")},
    **{name: [_DIGITS, _GPT2] for name in ("smollm", "refact", "starcoder")},
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _split(_WORDS % "")),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "chatglm-bpe", "glm4", "lfm2", "dbrx"),
        _split(_WORDS % "{1,3}"),
    ),
    "qwen35": _split(_MARKED_WORDS),
    "gpt-4o": _split(_CASED),
    "tekken": _split(_TEKKEN),
    "deepseek-llm": _split(*_DEEPSEEK, digits=True),
    "deepseek-v3": _split(*_DEEPSEEK_V3),
}
_NORMALIZED = ("qwen2", "qwen35", "deepseek-r1-qwen", "olmo")  # to NFC
# A token in the vocabulary needs no merges.
_WHOLE_TOKENS = ("llama-bpe", "llama3", "llama-v3", "lfm2", "tekken")


def text_files(
    metadata: Mapping[str, Any], context: int, vocab_size: int, where: str
) -> dict[str, bytes]:
    """Return the files of the tokenizer and template, by name. `context` is in tokens.

    `where` names the model in messages. Raises `CheckpointError` for a tokenizer that is damaged,
    of an unknown kind, or with more tokens than the model.
    """
    vocabulary = _Vocabulary(metadata, where)
    if len(vocabulary.tokens) > vocab_size:
        raise CheckpointError(f"{where}: its tokenizer has more tokens than the model embeds")
    if vocabulary.model == "llama":
        files = {"tokenizer.model": _sentencepiece_model(metadata, vocabulary)}
    elif vocabulary.model in ("gpt2", "gemma4"):
        form = _characters() if vocabulary.model == "gemma4" else _bytes(metadata, where)
        tokenizer = json.dumps(_merging(vocabulary, form), indent=2, ensure_ascii=False)
        files = {"tokenizer.json": tokenizer.encode()}
    else:
        raise CheckpointError(
            f"{where}: a tokenizer of the kind {vocabulary.model!r:.80} does not run"
        )
    settings = json.dumps(_settings(metadata, vocabulary, context), indent=2) + "\n"
    return {**files, "tokenizer_config.json": settings.encode()}


def generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the generation_config.json, with the ends of an answer and the makers' sampling."""
    ids = (metadata.get(f"{_KEY}{name}_token_id") for name in _ENDS)
    numbers = {key: metadata.get(f"general.sampling.{name}") for key, name in _SAMPLING.items()}
    # The metadata has floats of 32 bits, which turn 0.95 into 0.949999988.
    sampling = {
        key: round(number, 6)
        for key, number in numbers.items()
        if isinstance(number, (int, float)) and isfinite(number)
    }
    return {"eos_token_id": [*dict.fromkeys(i for i in ids if isinstance(i, int))], **sampling}


class _Vocabulary:
    """The tokens and their types. Raises `CheckpointError` if they do not fit together."""

    def __init__(self, metadata: Mapping[str, Any], where: str) -> None:
        self._metadata = metadata
        self.where = where
        self.model = metadata.get(f"{_KEY}model")
        self.tokens = self.texts("tokens")
        types = self.numbers("token_type", int) or [_NORMAL] * len(self.tokens)
        if len(types) != len(self.tokens) or not {*types} <= {*_TYPES}:
            raise CheckpointError(
                f"{where}: the types of its tokens are not those of its vocabulary"
            )
        if len({*self.tokens}) != len(self.tokens):
            raise CheckpointError(f"{where}: its vocabulary holds a token twice")
        self.types = types

    def texts(self, name: str) -> list[str]:
        values = self._metadata.get(f"{_KEY}{name}")
        if not isinstance(values, list) or not values or not isinstance(values[0], str):
            raise CheckpointError(f"{self.where}: it has no list {_KEY}{name}")
        return values

    def merges(self) -> list[list[str]]:
        pairs = [merge.split(" ", 1) for merge in self.texts("merges")]
        if any(len(pair) != 2 for pair in pairs):
            raise CheckpointError(f"{self.where}: one of {_KEY}merges is not two tokens")
        return pairs

    def numbers(self, name: str, *types: type) -> list[Any]:
        """Return a list of numbers of these types, empty if there is none."""
        values = self._metadata.get(f"{_KEY}{name}", [])
        if not isinstance(values, list) or not {*map(type, values)} <= {*types}:
            raise CheckpointError(f"{self.where}: {_KEY}{name} is not a list of numbers")
        return values

    def special(self) -> Iterator[tuple[str, int]]:
        """Yield the name ("bos") and the id of each special token in the metadata."""
        for name, gguf_name in _NAMES.items():
            token_id = self._metadata.get(f"{_KEY}{gguf_name}_token_id")
            if isinstance(token_id, int) and 0 <= token_id < len(self.tokens):
                yield name, token_id


def _bytes(metadata: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the parts of a tokenizer.json that splits a text into words, and words into bytes."""
    pre = metadata.get(f"{_KEY}pre")
    if not isinstance(pre, str) or pre not in _SPLITS:
        raise CheckpointError(
            f"{where}: its rules for splitting text, {pre!r:.80}, are not known",
            hint=f"It knows {', '.join(_SPLITS)}.",
        )
    steps = _SPLITS[pre]
    sequence = {"type": "Sequence", "pretokenizers": steps}
    return {
        "normalizer": {"type": "NFC"} if pre in _NORMALIZED else None,
        "pre_tokenizer": steps[0] if len(steps) == 1 else sequence,
        "decoder": {**_GPT2, "add_prefix_space": True},
        "model": {"ignore_merges": pre in _WHOLE_TOKENS},
    }


def _characters() -> dict[str, Any]:
    """Return the parts of Gemma 4's tokenizer.json. Its blanks are the character \u2581."""
    blank = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    shown = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    return {
        "normalizer": blank,
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [shown, {"type": "ByteFallback"}, {"type": "Fuse"}],
        },
        "model": {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True},
    }


def _merging(vocabulary: _Vocabulary, form: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tokenizer.json of a vocabulary with merges. `form` has its other parts."""
    tokens = vocabulary.tokens
    added = (_CONTROL, _USER_DEFINED)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": token, **flags, "special": token_type == _CONTROL}
            for number, (token, token_type) in enumerate(zip(tokens, vocabulary.types, strict=True))
            if token_type in added
        ],
        "post_processor": None,
        **form,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": vocabulary.merges(),
            **form["model"],
        },
    }


def _settings(metadata: Mapping[str, Any], vocabulary: _Vocabulary, context: int) -> dict[str, Any]:
    """Return the tokenizer_config.json, with the chat template."""
    # llama.cpp's defaults for files that do not say if a text begins with <s>.
    begins = vocabulary.model == "llama" or metadata.get(f"{_KEY}pre") in _WHOLE_TOKENS
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": bool(metadata.get(f"{_KEY}add_bos_token", begins)),
        "add_prefix_space": vocabulary.model == "llama",
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
        **{f"{name}_token": vocabulary.tokens[number] for name, number in vocabulary.special()},
    }
    template = metadata.get("tokenizer.chat_template")
    return {**settings, "chat_template": template} if isinstance(template, str) else settings


def _sentencepiece_model(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> bytes:
    """Return the tokenizer.model, a protocol buffer (sentencepiece_model.proto)."""
    scores = vocabulary.numbers("scores", int, float) or [0.0] * len(vocabulary.tokens)
    if len(scores) != len(vocabulary.tokens):
        raise CheckpointError(f"{vocabulary.where}: the scores of its tokens are not complete")
    if not all(-_SCORE_MAX <= score <= _SCORE_MAX for score in scores):  # nor NaN
        raise CheckpointError(f"{vocabulary.where}: a score of its tokens is no number of 32 bits")
    unknown = vocabulary.types.index(_UNKNOWN) if _UNKNOWN in vocabulary.types else -1
    # SentencePiece has one unknown piece, and llama.cpp may have several.
    types = [
        _CONTROL if token_type == _UNKNOWN and number != unknown else token_type
        for number, token_type in enumerate(vocabulary.types)
    ]
    pieces = zip(vocabulary.tokens, scores, types, strict=True)
    names = {name: vocabulary.tokens[number].encode() for name, number in vocabulary.special()}
    trainer = [
        _varint_field(3, 2),  # byte pairs
        _varint_field(35, _BYTE in vocabulary.types),
        *(_bytes_field(_PIECES[name], text) for name, text in names.items()),
    ]
    normalizer = [
        _bytes_field(1, b"identity"),
        _varint_field(3, bool(metadata.get(f"{_KEY}add_space_prefix", True))),
        _varint_field(4, bool(metadata.get(f"{_KEY}remove_extra_whitespaces", False))),
    ]
    return b"".join(
        [
            *(_bytes_field(1, _piece(*piece)) for piece in pieces),
            _bytes_field(2, b"".join(trainer)),
            _bytes_field(3, b"".join(normalizer)),
        ]
    )


# Protocol buffers: a field is its number and wire type, then a varint (type 0), or a length and
# its bytes (2). 0x15 is field 2 with 4 bytes (5), the score of a piece.
def _piece(text: str, score: float, token_type: int) -> bytes:
    return (
        _bytes_field(1, text.encode())
        + b"\x15"
        + struct.pack("<f", score)
        + _varint_field(3, token_type)
    )


def _bytes_field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint_field(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
