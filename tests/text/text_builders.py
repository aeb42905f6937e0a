"""Small tokenizers of every kind, in the files that checkpoints have."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mistral_common
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

DATA = Path(mistral_common.__file__).parent / "data"
V1_FILE = DATA / "tokenizer.model.v1"
V3_FILE = DATA / "mistral_instruct_tokenizer_240323.model.v3"

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = """\
{%- for message in messages %}
    {%- set text = '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' %}
    {%- set text = text + message.content | trim + '<|eot_id|>' %}
    {%- if loop.first %}{%- set text = bos_token + text %}{%- endif %}
    {{- text }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""
ZEPHYR = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% else %}
{% generation %}{{ '<|assistant|>\n' + message['content'] + eos_token }}{% endgeneration %}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""
ALPACA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}### Instruction:\n{{ m.content.strip() }}\n\n### Response:\n"
    "{% elif m.role == 'assistant' %}{{ m.content }}\n\n"
    "{% else %}{{ raise_exception('Only user and\n  assistant roles') }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}"
    "{% endif %}{% endfor %}"
)
MISTRAL_V3 = """\
{%- if messages[0].role == "system" %}
    {%- set system, messages = messages[0].content, messages[1:] %}
{%- endif %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == "user" %}
        {%- if loop.last and tools %}
            {{- "[AVAILABLE_TOOLS] " + tools | tojson + "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {{- "[INST] " }}
        {%- if loop.last and system is defined %}{{- system + "\n\n" }}{% endif %}
        {{- message.content + "[/INST]" }}
    {%- elif message.role == "tool" %}
        {{- "[TOOL_RESULTS] " + message.content + "[/TOOL_RESULTS]" }}
    {%- elif message.tool_calls %}
        {{- "[TOOL_CALLS] " + message.tool_calls | tojson + eos_token }}
    {%- else %}
        {{- " " + message.content | trim + eos_token }}
    {%- endif %}
{%- endfor %}"""
LLAMA2 = MISTRAL.replace("'[INST] '", "'[INST] <<SYS>>\\nBe kind.\\n<</SYS>>\\n\\n'")

CORPUS = [
    "Hello world, this is a test of the emergency broadcast system.",
    "The quick brown fox jumps over the lazy dog; user and assistant and system say so.",
    "if (a < b && c[0] > d) { return <html>; } // [INST] not a token | im_start im_end",
    "Grüße, здравствуй, 你好, 🙂👍 naïve café\n\n\ttabs  and   spaces",
] * 20


def byte_level(
    specials: Iterable[str] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *,
    ignore_merges: bool = False,
    plain: Iterable[str] = (),
) -> Tokenizer:
    """Return a byte-level BPE like GPT-2's; `plain` are added tokens that are not special."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in plain])
    return tokenizer


def llama_style(
    scores: dict[str, float], specials: Iterable[str] = (), *, legacy: bool
) -> Tokenizer:
    """Return a SentencePiece BPE as transformers converts it: Llama's tokenizer.json, old or new.

    `scores` are the pieces by id, control tokens and bytes in front.
    """
    pieces = list(scores)
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(pieces[259:], key=lambda piece: -scores[piece])
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if legacy:
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", *specials])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def unigram() -> Tokenizer:
    """Return a Unigram model whose vocabulary spells its control tokens, as T5's does."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def write_checkpoint(
    directory: Path,
    tokenizer: Tokenizer | None = None,
    *,
    template: object = None,
    model_file: Path | None = None,
    **config: Any,
) -> Path:
    """Write tokenizer.json, tokenizer.model and tokenizer_config.json, as far as they are given."""
    directory.mkdir(exist_ok=True, parents=True)
    if tokenizer is not None:
        tokenizer.save(str(directory / "tokenizer.json"))
    if model_file is not None:
        shutil.copy(model_file, directory / "tokenizer.model")
    if template is not None:
        config["chat_template"] = template
    if config:
        # transformers would build a LlamaTokenizer by its own rules, without reading the file.
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
        (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def controls_in(tokenizer: Any, ids: list[int]) -> list[int]:
    """Return the control tokens among ids; a character outside the vocabulary is <unk>."""
    control = set(tokenizer.control_tokens.values()) - {tokenizer.control_tokens.get("<unk>")}
    return [i for i in ids if i in control]
