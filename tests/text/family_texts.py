"""Small tokenizers and chat templates with the rules of the families that people run.

The templates say what the real ones say. Those that know tools are in `tool_texts`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import text_builders as build
import tool_texts
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_QWEN2 = (
    _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN35 = _QWEN2.replace(r"]?\p{L}+", r"]?[\p{L}\p{M}]+").replace(r"^\s\p{L}", r"^\s\p{L}\p{M}")
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDINGS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDINGS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_QWEN3_START = """\
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role != 'assistant' %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- else %}"""
_QWEN3_END = """
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}"""
_WITHOUT_THINKING = """
        {%- if '</think>' in content %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}"""
QWEN3_INSTRUCT = _QWEN3_START + _QWEN3_END + "\n{%- endif %}"
QWEN3_HYBRID = (
    _QWEN3_START
    + _WITHOUT_THINKING
    + _QWEN3_END
    + """
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
)
QWEN3_THINKING = _QWEN3_START + _WITHOUT_THINKING + _QWEN3_END + "{{- '<think>\\n' }}\n{%- endif %}"
OLMOE = """\
{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}\
{{ '<|system|>\n' + message['content'] + '\n' }}{% elif message['role'] == 'user' %}\
{{ '<|user|>\n' + message['content'] + '\n' }}{% elif message['role'] == 'assistant' %}\
{% if not loop.last %}{{ '<|assistant|>\n' + message['content'] + eos_token + '\n' }}{% else %}\
{{ '<|assistant|>\n' + message['content'] + eos_token }}{% endif %}{% endif %}\
{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"""


@dataclass(frozen=True)
class FamilyText:
    """A family's tokenizer rules. `plain` are added tokens that are not special."""

    templates: dict[str, str]
    pre_tokenizer: PreTokenizer
    special: tuple[str, ...]
    names: dict[str, str]  # of special tokens
    plain: tuple[str, ...] = ()
    nfc: bool = False
    # By whose own rules transformers builds it, without the file's.
    tokenizer_class: str = "PreTrainedTokenizerFast"
    settings: dict[str, Any] = field(default_factory=dict)

    def tokenizer(self) -> Tokenizer:
        tokenizer = Tokenizer(models.BPE())
        if self.nfc:
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = self.pre_tokenizer
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=list(self.special),
            initial_alphabet=ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(build.CORPUS, trainer)
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in self.plain])
        return tokenizer

    def write(self, directory: Path, template: str, **config: Any) -> Path:
        return build.write_checkpoint(
            directory,
            self.tokenizer(),
            template=template,
            **{**self.names, **self.settings, "tokenizer_class": self.tokenizer_class, **config},
        )


def _split(pattern: str) -> PreTokenizer:
    byte_level = ByteLevel(add_prefix_space=False, use_regex=False)
    return Sequence([Split(Regex(pattern), "isolated"), byte_level])


FAMILIES = {
    "qwen3": FamilyText(
        {"instruct": QWEN3_INSTRUCT, "hybrid": QWEN3_HYBRID, "thinking": QWEN3_THINKING},
        _split(_QWEN2),
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        ("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<think>", "</think>"),
        nfc=True,
        tokenizer_class="Qwen2Tokenizer",
    ),
    "gpt-oss": FamilyText(
        {"harmony": tool_texts.HARMONY},
        _split(_O200K),
        (
            *("<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>"),
            *("<|start|>", "<|end|>", "<|message|>", "<|call|>", "<|endofprompt|>"),
        ),
        {"bos_token": "<|startoftext|>", "eos_token": "<|return|>", "pad_token": "<|endoftext|>"},
    ),
    "granite": FamilyText(
        {"3.1": tool_texts.GRANITE},
        Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]),
        (
            *("<|end_of_text|>", "<fim_prefix>", "<filename>", "<reponame>"),
            *("<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"),
        ),
        {name: "<|end_of_text|>" for name in ("bos_token", "eos_token", "unk_token", "pad_token")},
    ),
    "olmoe": FamilyText(
        {"0125": OLMOE},
        ByteLevel(add_prefix_space=False),
        ("<|padding|>", "<|endoftext|>"),
        {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|padding|>"},
        ("|||IP_ADDRESS|||", *(" " * count for count in range(8, 1, -1))),
        nfc=True,
        tokenizer_class="GPTNeoXTokenizer",
        settings={"add_bos_token": False, "add_eos_token": False},
    ),
    "gemma4": FamilyText(
        {"4": tool_texts.GEMMA},
        _split(_QWEN2),
        (
            *("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>", "<|think|>"),
            *("<|channel>", "<channel|>", "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>"),
            *('<|"|>', "<|tool_response>", "<tool_response|>", "<|image|>", "<|audio|>"),
        ),
        {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
    ),
    "qwen3.6": FamilyText(
        {},
        _split(_QWEN35),
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        ("<tool_call>", "</tool_call>", "<think>", "</think>"),
        nfc=True,
    ),
    "glm-4.7": FamilyText(
        {},
        _split(_LLAMA3),
        (
            *("<|endoftext|>", "[MASK]", "[gMASK]", "<sop>", "<|system|>", "<|user|>"),
            *("<|assistant|>", "<|observation|>"),
        ),
        {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        (
            *("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>"),
            *("</tool_response>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
        ),
    ),
    "lfm2": FamilyText(
        {},
        _split(_LLAMA3),
        (
            *("<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"),
            *("<|tool_list_start|>", "<|tool_list_end|>", "<|tool_call_start|>"),
            *("<|tool_call_end|>", "<|tool_response_start|>", "<|tool_response_end|>"),
        ),
        {"bos_token": "<|startoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>"},
        ("<think>", "</think>"),
        settings={"add_bos_token": True},
    ),
}
