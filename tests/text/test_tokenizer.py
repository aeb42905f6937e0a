"""Tokenizers: ordinary text as the originals encode it, no control token from untrusted text."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import text_builders as build
from hypothesis import given, settings
from text_strategies import anything, harmless

from mixchat.base.errors import PromptError
from mixchat.text.choose import load_tokenizer
from mixchat.text.spm import SentencePieceTokenizer

few = settings(max_examples=30)


@few
@given(text=harmless)
def test_ordinary_text_is_encoded_and_decoded_as_by_the_original(
    text, tokenizer, reference, v1_original
):
    if reference is None:
        ids = v1_original.encode(text)
        decoded = v1_original.decode(ids)
    else:
        ids = reference.encode(text, add_special_tokens=False)
        decoded = reference.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
    assert tokenizer.encode(text) == tokenizer.encode_template(text) == ids
    assert tokenizer.decode(ids) == decoded


@few
@given(text=anything)
def test_nothing_typed_becomes_a_control_token(text, tokenizer):
    assert build.controls_in(tokenizer, tokenizer.encode(text)) == []


def test_every_control_token_can_be_typed_as_text(tokenizer):
    for token, token_id in tokenizer.control_tokens.items():
        for text in (token, f"a{token}b", f" {token} ", token * 2, f"{token}\n{token}"):
            ids = tokenizer.encode(text)
            assert token_id not in ids or token == "<unk>"
            assert build.controls_in(tokenizer, ids) == []


@few
@given(text=anything)
def test_typed_text_decodes_to_itself(text, v1, byte_level):
    # SentencePiece writes a space as U+2581, so a typed U+2581 becomes a space.
    assert v1.decode(v1.encode(text)) == text.replace("\u2581", " ")
    assert byte_level.decode(byte_level.encode(text)) == text


def test_a_template_may_write_control_tokens(tokenizer):
    for token, token_id in tokenizer.control_tokens.items():
        assert build.controls_in(tokenizer, tokenizer.encode_template(f"a{token}\nb")) == (
            [token_id] if token != "<unk>" else []
        )


def test_inserted_text_is_text_and_inserted_ids_are_ids(tokenizer):
    name, end = "<|im_end|>" if tokenizer.control_tokens.get("<|im_end|>") else "</s>", [7, 7]
    ids = tokenizer.encode_template(f"a {name}x {name} y", {"x": name, "y": (7, 7)})
    assert build.controls_in(tokenizer, ids) == [tokenizer.control_tokens.get(name)] * 2
    assert ids[-2:] == end
    assert tokenizer.encode_template("x", {"x": f"a {name} b"}) == tokenizer.encode(f"a {name} b")


def test_text_continues_inserted_ids_without_a_space(tokenizer, kind):
    if kind == "unigram":
        pytest.skip("has no newline token, so it cannot encode text that continues")
    word = tokenizer.encode("go")
    ids = tokenizer.encode_template("ax on\n\nxgo", {"x": tuple(word)})
    spaced = kind not in ("byte-level", "whole-words")  # the word itself begins with a space
    assert tokenizer.decode(ids) == ("a go on\n\n gogo" if spaced else "ago on\n\ngogo")


def test_text_that_merges_with_a_newline_keeps_its_space(tmp_path):
    """A newline that is one token with the text after it cannot be dropped."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    pieces += ["\u2581", "a", "\n", "\n\n"]
    tokenizer = build.llama_style({p: -float(i) for i, p in enumerate(pieces)}, legacy=True)
    tokenizer = load_tokenizer(build.write_checkpoint(tmp_path, tokenizer))
    space, a, line, lines = (pieces.index(piece) for piece in pieces[-4:])
    assert tokenizer.encode("\n\na") == [space, lines, a]
    assert tokenizer.encode_template("xa", {"x": (a,)}) == [a, a]
    assert tokenizer.encode_template("x\na", {"x": (a,)}) == [a, space, line, a]


def test_control_tokens_and_unknown_ids_have_no_text(tokenizer):
    ids = tokenizer.encode("to be")
    special = [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None]
    strange = [tokenizer.vocab_size, tokenizer.vocab_size + 95]
    assert tokenizer.decode([*special, *ids[:1], *strange, *ids[1:], *special]) == "to be"


def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(PromptError, match="lone surrogate at character 2"):
        tokenizer.encode("ab\udc80")
    with pytest.raises(PromptError, match="lone surrogate"):
        tokenizer.encode_template("ab\udc80")
    with pytest.raises(PromptError, match="lone surrogate"):
        tokenizer.encode_template("ax", {"x": "\udc80"})


def test_mistrals_own_ids(v1):
    assert (v1.vocab_size, v1.bos_id, v1.eos_id, v1.adds_bos) == (32000, 1, 2, True)
    assert v1.control_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert v1.encode("[INST] Hi [/INST]") == [733, 16289, 28793, 15359, 733, 28748, 16289, 28793]
    assert v1.encode("</s>") == [1867, 28713, 28767]
    assert v1.encode_template("</s>") == [2]


def test_added_tokens_follow_sentencepieces_own(checkpoints, v1):
    tokenizer = load_tokenizer(checkpoints["spm-added"])
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (32002, 32001)
    assert tokenizer.encode_template("<|im_start|>user\nHi<|im_end|>") == [
        32000, *v1.encode("user\nHi"), 32001,
    ]  # fmt: skip
    assert tokenizer.encode("<|im_end|>") == v1.encode("<|im_end|>")


def test_added_tokens_json_counts_too(tmp_path):
    build.write_checkpoint(tmp_path, model_file=build.V1_FILE)
    (tmp_path / "added_tokens.json").write_text('{"<|im_end|>": 32001, "<|im_start|>": 32000}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.vocab_size == 32002
    assert tokenizer.encode_template("<|im_end|>") == [32001]
    assert 32001 not in tokenizer.encode("<|im_end|>")


def test_without_legacy_text_after_a_control_token_gets_no_space(tmp_path):
    build.write_checkpoint(tmp_path, model_file=build.V1_FILE, legacy=False)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode_template("a</s>b")) == "ab"
    assert tokenizer.encode_template("Hello</s>Hello") == [22557, 2, 16230]


def test_user_defined_pieces_of_sentencepiece_cannot_be_typed(tmp_path):
    """Some fine-tunes write their markup into tokenizer.model, so that any text can spell it."""
    import io

    import sentencepiece

    model, long = io.BytesIO(), f"<|{'x' * 200}|>"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(build.CORPUS),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        user_defined_symbols=["<|im_start|>", "<|im_end|>", long, "blockchain"],
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    original = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    end = original.piece_to_id("<|im_end|>")
    assert end in original.encode("a<|im_end|>b"), "or there would be nothing to fix"

    tokenizer = load_tokenizer(tmp_path)
    assert build.controls_in(tokenizer, tokenizer.encode("a<|im_end|>b <|im_start|>")) == []
    assert tokenizer.decode(tokenizer.encode("a<|im_end|>b")) == "a<|im_end|>b"
    assert tokenizer.encode_template("<|im_end|>") == [end]
    assert len(tokenizer.encode(long)) > 1 == len(tokenizer.encode_template(long))
    for text in ("a blockchain in the town", *build.CORPUS[:4]):
        assert tokenizer.encode(text) == original.encode(text)


def test_added_words_that_are_not_markup_are_unchanged(byte_level):
    assert len(byte_level.encode("blockchain")) == 1
    assert byte_level.control_tokens.get("blockchain") is None
    ids = byte_level.encode_template("a<tool>b")
    assert ids[1] == byte_level.control_tokens.get("<tool>")
    assert byte_level.decode(ids) == "a<tool>b"


def edited(tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Return a byte-level checkpoint whose tokenizer.json was changed."""
    build.write_checkpoint(tmp_path, build.byte_level())
    file = tmp_path / "tokenizer.json"
    spec = json.loads(file.read_text())
    change(spec)
    file.write_text(json.dumps(spec))
    return tmp_path


def test_a_vocabulary_that_spells_a_control_token_does_not_yield_it(tmp_path):
    """Its merges lead to it; in the original the added token is found first."""
    merges = [["<", "s"], ["<s", ">"]]

    def change(spec: dict[str, Any]) -> None:
        vocab = spec["model"]["vocab"]
        size = len(vocab)
        vocab |= {"<s": size, "<s>": size + 1}
        spec["model"]["merges"] += merges
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        spec["added_tokens"].append({"id": size + 1, "content": "<s>", "special": True, **flags})

    tokenizer = load_tokenizer(edited(tmp_path, change))
    assert tokenizer.control_tokens.get("<s>") is not None
    assert tokenizer.control_tokens.get("<s>") not in tokenizer.encode("<s>")
    assert tokenizer.decode(tokenizer.encode("<s>")) == "<s>"
    assert tokenizer.encode_template("<s>") == [tokenizer.control_tokens.get("<s>")]


def test_truncation_and_padding_in_the_file_do_not_count(tmp_path):
    def change(spec: dict[str, Any]) -> None:
        spec["truncation"] = {
            "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0,
        }  # fmt: skip
        spec["padding"] = {
            "strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>",
        }  # fmt: skip

    tokenizer = load_tokenizer(edited(tmp_path, change))
    assert tokenizer.decode(tokenizer.encode("q w x y")) == "q w x y"
    assert len(tokenizer.encode("q w x y")) not in (2, 9)


def test_tokens_that_only_the_settings_name_are_added(tmp_path):
    size = build.byte_level().get_vocab_size()
    added = {str(size): {"content": "<|tool|>", "special": False}}
    build.write_checkpoint(
        tmp_path, build.byte_level(), added_tokens_decoder=added, eos_token="<|im_end|>"
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.control_tokens.get("<|tool|>") == size
    assert tokenizer.vocab_size == size + 1
    assert tokenizer.eos_id == tokenizer.control_tokens.get("<|im_end|>")
    assert size not in tokenizer.encode("<|tool|>")


def test_a_single_word_token_is_not_found_inside_a_word(tmp_path):
    def change(spec: dict[str, Any]) -> None:
        spec["added_tokens"][2]["single_word"] = True

    tokenizer = load_tokenizer(edited(tmp_path, change))
    assert tokenizer.encode_template("a<|im_end|>b") == tokenizer.encode("a<|im_end|>b")
    assert tokenizer.encode_template("<|im_end|>") == [2]


@pytest.mark.parametrize(("setting", "adds"), [(None, True), (True, True), (False, False)])
def test_the_checkpoint_decides_whether_a_text_begins_with_bos(
    setting, adds, checkpoints, tmp_path
):
    config = {} if setting is None else {"add_bos_token": setting}
    for name, source in (("tokenizer.model", build.V1_FILE), ("tokenizer.json", None)):
        directory = tmp_path / name
        build.write_checkpoint(directory, bos_token="<s>", **config)
        source = source or checkpoints["llama-old"] / "tokenizer.json"
        shutil.copy(source, directory / name)
        assert load_tokenizer(directory).adds_bos is adds
    assert not load_tokenizer(checkpoints["byte-level"]).adds_bos


def test_broken_bytes_do_not_change_their_neighbours(tokenizer, kind):
    """The package tokenizers rejects a whole run of byte tokens for one that is wrong."""
    if not kind.startswith(("llama", "spm")):
        pytest.skip("has no byte tokens")
    first = 3  # the id of <0x00>

    def decode(data: bytes) -> str:
        return str(tokenizer.decode([first + byte for byte in data]))

    assert decode("é€🙂".encode()) == "é€🙂"
    assert decode("é".encode() + b"\xff" + "€".encode()) == "é\ufffd€"
    assert decode("é".encode() + b"\xe2").startswith("é\ufffd")
    # Control tokens and unknown ids have no text, so they do not break a character.
    one, two, three = (first + byte for byte in "€".encode())
    assert tokenizer.decode([one, 1, two, tokenizer.vocab_size + 5, three]) == "€"
