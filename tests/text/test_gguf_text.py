"""Tokenizers and templates out of a GGUF's metadata are the originals, token for token."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import mistral_common
import pytest
import text_builders as build
from family_texts import FAMILIES
from sentencepiece import SentencePieceProcessor
from test_family_texts import WORDS
from text_strategies import CONTROL, SHARDS
from tiny_tokenizer import metadata
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from mixchat.base.errors import CheckpointError
from mixchat.install.source.gguf_text import _SPLITS, generation_config, text_files
from mixchat.text.choose import load_template, load_tokenizer
from mixchat.text.messages import Message
from mixchat.text.spm import _user_defined
from mixchat.text.tokenizer import Tokenizer as OurTokenizer

DATA = Path(mistral_common.__file__).parent / "data"
MISTRAL = "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"
RULES = {
    "qwen3": "qwen2",
    "gpt-oss": "gpt-4o",
    "granite": "refact",
    "olmoe": "olmo",
    "qwen3.6": "qwen35",
    "lfm2": "lfm2",
    "glm-4.7": "glm4",
}
_NAMES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def texts() -> list[str]:
    draw = random.Random(1)
    pieces = [*WORDS, *CONTROL, *SHARDS, " ", " ", "\n", "한국어", "\U0001f9d1\u200d\U0001f680"]
    return ["".join(draw.choices(pieces, k=draw.randrange(1, 30))) for _ in range(150)]


def written(files: dict[str, bytes], directory: Path) -> Path:
    directory.mkdir()
    for name, data in files.items():
        (directory / name).write_bytes(data)
    return directory


def assert_same(made: OurTokenizer, original: OurTokenizer) -> None:
    assert made.control_tokens == original.control_tokens
    assert (made.bos_id, made.eos_id) == (original.bos_id, original.eos_id)
    assert (made.adds_bos, made.vocab_size) == (original.adds_bos, original.vocab_size)
    for text in texts():
        ids = original.encode(text)
        assert made.encode(text) == ids, text
        assert made.encode_template(text) == original.encode_template(text), text
        assert made.decode(ids) == original.decode(ids)


# Granite 4.0 has the rule "dbrx", which is GLM's.
@pytest.mark.parametrize(("family", "rule"), [*RULES.items(), ("glm-4.7", "dbrx")])
def test_byte_pairs_are_the_original_s(family, rule, tmp_path):
    text = FAMILIES[family]
    name, template = next(iter(text.templates.items()), (family, MISTRAL))
    original = text.write(tmp_path / "original", template)
    spec = json.loads((original / "tokenizer.json").read_bytes())
    found = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": rule,
        "tokenizer.chat_template": template,
        **merging(spec, text.names),
    }
    tokens = len(found["tokenizer.ggml.tokens"])
    made = written(text_files(found, 512, tokens, name), tmp_path / "made")
    assert_same(load_tokenizer(made), load_tokenizer(original))
    talk = [Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "12 + 34?")]
    encoded = [load_template(d, load_tokenizer(d)).encode(talk) for d in (made, original)]
    assert encoded[0] == encoded[1]


def test_tekken_splits_text_as_mistral_common_does():
    published = json.loads((DATA / "tekken_240911.json").read_bytes())
    assert _SPLITS["tekken"][0]["pattern"] == {"Regex": published["config"]["pattern"]}


@pytest.mark.parametrize(
    ("rule", "pieces"),
    [
        # Its class of signs has the letters of ASCII, too.
        (
            "deepseek-llm",
            ["Hi", ",", " w", "\u00f6", "rld", " ", "2", "0", "2", "4", "!", "\n", "\u4f60\u597d"],
        ),
        ("deepseek-v3", ["Hi", ",", " w\u00f6rld", " ", "202", "4", "!\n", "\u4f60\u597d"]),
    ],
)
def test_deepseeks_rules_split_a_text(rule, pieces):
    steps = {"type": "Sequence", "pretokenizers": _SPLITS[rule]}
    tokenizer = Tokenizer(models.BPE())
    spec = json.loads(tokenizer.to_str()) | {"pre_tokenizer": steps}
    split = Tokenizer.from_str(json.dumps(spec)).pre_tokenizer.pre_tokenize_str
    text = "".join(pieces)
    assert [text[start:end] for _, (start, end) in split(text)] == pieces


def merging(spec: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """The metadata of a tokenizer.json with merges, and with special tokens of these names."""
    added = {token["id"]: 3 if token["special"] else 4 for token in spec["added_tokens"]}
    ids = {token: number for token, number in spec["model"]["vocab"].items()}
    ids |= {token["content"]: token["id"] for token in spec["added_tokens"]}
    is_byte = {ids[token] for token in ids if re.fullmatch("<0x..>", token)}
    special = {
        f"tokenizer.ggml.{theirs}_token_id": ids[names[f"{short}_token"]]
        for short, theirs in _NAMES.items()
        if f"{short}_token" in names
    }
    return {
        "tokenizer.ggml.tokens": sorted(ids, key=ids.__getitem__),
        "tokenizer.ggml.token_type": [
            6 if n in is_byte else added.get(n, 1) for n in range(len(ids))
        ],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in spec["model"]["merges"]],
        **special,
    }


def test_gemma_4_s_merges_of_characters_are_the_original_s(tmp_path):
    """Its quote is in no list of special tokens there, and text may not have it all the same."""
    original = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    original.normalizer = normalizers.Replace(" ", "\u2581")
    original.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    original.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    original.train_from_iterator(build.CORPUS, trainer)
    original.add_tokens([AddedToken('<|"|>', normalized=False)])
    spec = json.loads(original.to_str())
    kept = [token for token in spec["added_tokens"] if not token["content"].startswith("<0x")]
    spec["added_tokens"] = kept
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "tokenizer.json").write_text(json.dumps(spec))
    settings = {**names, "add_bos_token": True, "clean_up_tokenization_spaces": False}
    (tmp_path / "original" / "tokenizer_config.json").write_text(json.dumps(settings))
    found = {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.add_bos_token": True,
        **merging(spec, names),
    }
    tokens = len(found["tokenizer.ggml.tokens"])
    made = load_tokenizer(written(text_files(found, 512, tokens, "g"), tmp_path / "made"))
    assert_same(made, load_tokenizer(tmp_path / "original"))
    assert made.encode('<|"|>') != made.encode_template('<|"|>')


@pytest.mark.parametrize(
    "file", ["tokenizer.model.v1", "mistral_instruct_tokenizer_240323.model.v3"]
)
def test_sentencepiece_is_the_original_s(file, tmp_path):
    data = (DATA / file).read_bytes()
    model = SentencePieceProcessor(model_proto=data)
    ids = range(model.vocab_size())
    typed = _user_defined(data)

    def token_type(n: int) -> int:
        if model.is_unknown(n):
            return 2
        if model.is_control(n):
            return 3
        return 4 if n in typed else 6 if model.is_byte(n) else 1

    found = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [model.id_to_piece(n) for n in ids],
        "tokenizer.ggml.scores": [model.get_score(n) for n in ids],
        "tokenizer.ggml.token_type": [token_type(n) for n in ids],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": MISTRAL,
    }
    files = text_files(found, 32768, len(ids), file)
    made = written(files, tmp_path / "made")
    original = written({**files, "tokenizer.model": data}, tmp_path / "original")
    assert_same(load_tokenizer(made), load_tokenizer(original))


def test_sampling_is_what_the_makers_advise():
    metadata = {
        "tokenizer.ggml.eos_token_id": 2,
        "general.sampling.temp": 0.6000000238418579,
        "general.sampling.top_k": 20,
        "general.sampling.top_p": "high",
        "general.sampling.min_p": float("nan"),
        "general.sampling.penalty_repeat": 1.0499999523162842,
    }
    assert generation_config(metadata) == {
        "eos_token_id": [2], "temperature": 0.6, "top_k": 20, "repetition_penalty": 1.05
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.pre": "mpt"}, "rules for splitting text, 'mpt', are not known"),
        ({"tokenizer.ggml.pre": None}, "are not known"),
        ({"tokenizer.ggml.model": "bert"}, "kind 'bert' does not run"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "types of its tokens"),
        ({"tokenizer.ggml.tokens": ["a"] * 262}, "a token twice"),
        ({"tokenizer.ggml.tokens": 5}, "no list tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.merges": 5}, "no list tokenizer.ggml.merges"),
        ({"tokenizer.ggml.token_type": [9] * 262}, "types of its tokens"),
        (
            {"tokenizer.ggml.tokens": [*map(str, range(263))], "tokenizer.ggml.token_type": []},
            "more",
        ),
        ({"tokenizer.ggml.merges": ["h e", "ll"]}, "merges is not two tokens"),
        ({"tokenizer.ggml.token_type": [1.0] * 262}, "token_type is not a list of numbers"),
        ({"tokenizer.ggml.token_type": [True] * 262}, "token_type is not a list of numbers"),
        ({"tokenizer.ggml.token_type": "1"}, "token_type is not a list of numbers"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [1.0]}, "scores"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [""] * 262}, "list of numbers"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": 1.0}, "list of numbers"),
        *(
            ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [score] * 262}, "32 bits")
            for score in (1e300, -1e39, math.inf, math.nan, 2**200)
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(change, message):
    with pytest.raises(CheckpointError, match=message):
        text_files(metadata() | change, 128, 262, "x")


ODD: dict[str, Any] = {
    "0": 0,
    "-1": -1,
    "2**64 - 1": 2**64 - 1,
    "1e300": 1e300,
    "NaN": math.nan,
    "true": True,
    "no text": "",
    "a long text": "{" * 100_000,
    "controls": "\x1b[31m\0\n\u202e{% raw",
    "an empty list": [],
    **{
        f"a list of {value!r}": [value] * 262
        for value in (0, 1, -1, 2**64 - 1, 1.0, 1e300, math.inf, math.nan, True, "", "a b")
    },
    "a list of texts": [f"{number} \0\u202e" for number in range(262)],
}


@pytest.mark.parametrize("model", ["gpt2", "gemma4", "llama"])
def test_no_value_of_the_metadata_ends_in_another_error_than_one_line(model):
    """Scores of 1e300, and types in 64 bits of floats, ended in an internal error."""
    whole = {
        **metadata(),
        "tokenizer.ggml.model": model,
        "tokenizer.ggml.scores": [0.0] * 262,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.remove_extra_whitespaces": False,
        "general.sampling.top_k": 3,
    }
    lines = []
    for key in whole:
        for value in ODD.values():
            generation_config({**whole, key: value})
            try:
                text_files({**whole, key: value}, 128, 262, "x")
            except CheckpointError as error:
                lines.append(str(error))
    assert len(lines) > 50
    assert all(len(line) < 300 and line.isprintable() for line in lines), max(lines, key=len)
