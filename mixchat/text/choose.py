"""Chooses the tokenizer and the template of a checkpoint by its files.

Both run in this process, so they may loop or take all memory. Outside of tests `CheckpointText`
loads them in a sandbox.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from mixchat.base.errors import CheckpointError
from mixchat.text.hf import JsonTokenizer
from mixchat.text.jinja_template import JinjaTemplate
from mixchat.text.spm import SentencePieceTokenizer
from mixchat.text.template import CompletionTemplate, InstructTemplate, Template
from mixchat.text.tokenizer import Tokenizer
from mixchat.text.tokenizer_files import (
    ChatTemplate,
    read_chat_template,
    read_optional_json,
    read_special_tokens,
)

_SENTENCEPIECE_FILE = "tokenizer.model"
_JSON_FILE = "tokenizer.json"
# Tokens that close a turn, in the chat formats that fine-tunes use.
_TURN_ENDS = (
    *("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>"),
    *("<turn|>", "<|tool_response>"),  # otherwise Gemma 4's models write the tool's response, too
)
# Control markup in a template's source. Square brackets mostly belong to Jinja there, so only
# capitals in them count.
_MARKUP = re.compile(r"<<\w+>>|<[^\s<>{}\w]*\w[^\s<>{}]*>|\[/?[A-Z][A-Z_]+\]|###")
_MISTRAL_V1 = frozenset({"<s>", "</s>", "<unk>", "[INST]", "[/INST]"})
_MISTRAL_V3 = _MISTRAL_V1 | {
    *("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
}


def load_tokenizer(directory: Path) -> Tokenizer:
    """Load the tokenizer of the checkpoint in `directory`.

    tokenizer.model, the original of Mistral's own models, comes first. A fine-tune with another
    chat template also brings control tokens, which tokenizer.json describes better. Raises
    `CheckpointError` if there is neither, or one cannot be read.
    """
    spm_file = directory / _SENTENCEPIECE_FILE
    json_file = directory / _JSON_FILE
    template = read_chat_template(directory)
    generation = 1 if template is None else _mistral_generation(template.source)
    if spm_file.exists() and (generation or not json_file.exists()):
        tokenizer = SentencePieceTokenizer(spm_file)
        is_later = "[INST]" in tokenizer.control_tokens
        if generation == 1 or is_later or not json_file.exists():
            return tokenizer
    if json_file.exists():
        return JsonTokenizer(json_file)
    raise CheckpointError(f"{directory}: there is no {_SENTENCEPIECE_FILE} and no {_JSON_FILE}")


def load_template(directory: Path, tokenizer: Tokenizer) -> Template:
    """Load the template of the checkpoint in `directory`, whose tokenizer is `tokenizer`.

    A checkpoint without a chat template counts as a base model. Raises `CheckpointError` if the
    template, or another file next to it, is damaged.
    """
    file = directory / "generation_config.json"
    value = read_optional_json(file).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(i) is not int or i < 0 for i in ids):
        raise CheckpointError(f"{file}: eos_token_id is {value!r:.80}, not an id or a list of ids")
    # Some models have more tokens that end a turn than their tokenizer names.
    stop_ids: set[int] = {*ids}
    template = read_chat_template(directory)
    if template is None:
        return CompletionTemplate(tokenizer, stop_ids=stop_ids, add_bos=tokenizer.adds_bos)
    if _is_instruct(template, tokenizer):
        return InstructTemplate(tokenizer, stop_ids=stop_ids)
    # The special tokens by name, as transformers hands them to a chat template.
    by_id = {token_id: token for token, token_id in tokenizer.control_tokens.items()}
    defaults = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    variables = {name: by_id[i] for name, i in defaults.items() if i in by_id}
    variables |= read_special_tokens(directory)
    jinja = JinjaTemplate(template, tokenizer, variables=variables)
    turn_ends: Iterable[str] = (token for token in _TURN_ENDS if token in template.source)
    if jinja.thinking is not None and jinja.thinking.turn_ends:
        turn_ends = jinja.thinking.turn_ends
    ends = (tokenizer.eos_id, *map(tokenizer.control_tokens.get, turn_ends))
    jinja.stop_ids = frozenset(stop_ids.union(i for i in ends if i is not None))
    return jinja


def _mistral_generation(source: str) -> int | None:
    """Return the generation of a chat template by Mistral, None for other templates.

    In the first generation `[INST]` and `[/INST]` are ordinary text, and there is no other markup.
    The second and third have markup for tools, too.
    """
    markup = set(_MARKUP.findall(source))
    if "[INST]" not in markup or not markup <= _MISTRAL_V3:
        return None
    return 1 if markup <= _MISTRAL_V1 else 3


def _is_instruct(template: ChatTemplate, tokenizer: Tokenizer) -> bool:
    generation = _mistral_generation(template.source)
    if generation is None or not isinstance(tokenizer, SentencePieceTokenizer):
        return False
    if "[INST]" in tokenizer.control_tokens:
        # Mistral's own templates have no space here. Others add one, which is a token of its own.
        return " [/INST]" not in template.source
    return generation == 1
