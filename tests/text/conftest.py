"""Checkpoint directories with a tokenizer of every kind. Tests must not write into them."""

from pathlib import Path
from typing import Any

import pytest
import text_builders as build

from mixchat.text.choose import load_tokenizer

KINDS = ["spm", "spm-added", "byte-level", "whole-words", "llama-old", "llama-new", "unigram"]
ADDED = {"<|im_start|>": 32000, "<|im_end|>": 32001}


@pytest.fixture(scope="session")
def v1_scores() -> dict[str, float]:
    """The pieces of Mistral's tokenizer by id, each with its score."""
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(build.V1_FILE))
    ids = list(range(model.vocab_size()))
    return dict(zip(model.id_to_piece(ids), model.get_score(ids), strict=True))


@pytest.fixture(scope="session")
def checkpoints(
    tmp_path_factory: pytest.TempPathFactory, v1_scores: dict[str, float]
) -> dict[str, Path]:
    """A directory for each of `KINDS`; all but "spm" have a ChatML template."""
    root = tmp_path_factory.mktemp("tokenizers")
    small = {p: s for i, (p, s) in enumerate(v1_scores.items()) if i < 4000 or len(p) == 1}
    im = ["<|im_start|>", "<|im_end|>"]
    names: dict[str, Any] = {"bos_token": "<s>", "eos_token": "<|im_end|>", "unk_token": "<unk>"}
    gpt: dict[str, Any] = {"eos_token": {"__type": "AddedToken", "content": "<|im_end|>"}}
    made = {
        "spm": build.write_checkpoint(root / "spm", model_file=build.V1_FILE),
        "spm-added": build.write_checkpoint(
            root / "spm-added",
            model_file=build.V1_FILE,
            template=build.CHATML,
            added_tokens_decoder={
                str(i): {"content": token, "special": True} for token, i in ADDED.items()
            },
            **names,
        ),
        "byte-level": build.write_checkpoint(
            root / "byte-level",
            build.byte_level(plain=["<tool>", "[TOOL_CALLS]", "blockchain"]),
            template=build.CHATML,
            **gpt,
        ),
        "whole-words": build.write_checkpoint(
            root / "whole-words",
            build.byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ignore_merges=True),
            template=build.CHATML,
            **gpt,
        ),
        "unigram": build.write_checkpoint(
            root / "unigram", build.unigram(), template=build.CHATML, **names
        ),
    }
    for name, legacy in (("llama-old", True), ("llama-new", False)):
        tokenizer = build.llama_style(small, im, legacy=legacy)
        made[name] = build.write_checkpoint(root / name, tokenizer, template=build.CHATML, **names)
    return made


@pytest.fixture(params=KINDS, scope="session")
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def directory(checkpoints: dict[str, Path], kind: str) -> Path:
    return checkpoints[kind]


@pytest.fixture(scope="session")
def tokenizer(directory: Path) -> Any:
    return load_tokenizer(directory)


@pytest.fixture(scope="session")
def reference(directory: Path) -> Any:
    """transformers' tokenizer of the same directory, None if there is only tokenizer.model."""
    if not (directory / "tokenizer.json").exists():
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="session")
def v1(checkpoints: dict[str, Path]) -> Any:
    return load_tokenizer(checkpoints["spm"])


@pytest.fixture(scope="session")
def byte_level(checkpoints: dict[str, Path]) -> Any:
    return load_tokenizer(checkpoints["byte-level"])


@pytest.fixture(scope="session")
def v1_original() -> Any:
    """SentencePiece itself with Mistral's file."""
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(build.V1_FILE))
