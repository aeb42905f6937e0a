"""A tokenizer and a template that work, as small as they can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def metadata() -> dict[str, Any]:
    """A GGUF file's tokenizer: three control tokens, GPT-2's 256 bytes, and three merges."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = ["he", "ll", "hell"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [
            "<|endoftext|>",
            "<|im_start|>",
            "<|im_end|>",
            *alphabet,
            *merged,
        ],
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * 259,
        "tokenizer.ggml.merges": ["h e", "l l", "he ll"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
    }


def write_tokenizer(directory: Path) -> Path:
    """Put the files of this tokenizer into a checkpoint's directory."""
    from mixchat.install.source.gguf_text import text_files

    for name, data in text_files(metadata(), 128, 262, "tiny").items():
        (directory / name).write_bytes(data)
    return directory
