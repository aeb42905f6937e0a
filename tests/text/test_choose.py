"""The choice of a checkpoint's template, and of the ids that end an answer."""

import json
from pathlib import Path
from typing import Any

import pytest
import text_builders as build

from mixchat.base.errors import CheckpointError
from mixchat.text.choose import load_template, load_tokenizer
from mixchat.text.hf import JsonTokenizer
from mixchat.text.jinja_template import JinjaTemplate
from mixchat.text.messages import Message
from mixchat.text.spm import SentencePieceTokenizer
from mixchat.text.template import CompletionTemplate, InstructTemplate


def chosen(directory: Path) -> Any:
    return load_template(directory, load_tokenizer(directory))


SPM, JSON = SentencePieceTokenizer, JsonTokenizer
V1, V3 = build.V1_FILE, build.V3_FILE
NAMED = [{"name": "rag", "template": build.MISTRAL}, {"name": "default", "template": build.CHATML}]
INDENTED = build.MISTRAL.replace("'[INST] '", "' [INST] '")


@pytest.mark.parametrize(
    ("has_json", "model_file", "template", "tokenizer", "kind"),
    [
        (True, V1, None, SPM, CompletionTemplate),  # a base model
        (True, V1, build.MISTRAL, SPM, InstructTemplate),  # built from ids
        (True, V1, INDENTED, SPM, InstructTemplate),
        (True, V1, build.CHATML, JSON, JinjaTemplate),
        (True, V1, build.LLAMA2, JSON, JinjaTemplate),
        (True, V1, build.ALPACA, JSON, JinjaTemplate),
        (True, V1, NAMED, JSON, JinjaTemplate),
        (False, V1, build.CHATML, SPM, JinjaTemplate),
        (True, None, build.MISTRAL, JSON, JinjaTemplate),
        (True, None, build.CHATML, JSON, JinjaTemplate),
        (True, V3, build.MISTRAL_V3, SPM, InstructTemplate),
        (False, V3, build.MISTRAL_V3, SPM, InstructTemplate),
        (True, V3, build.CHATML, JSON, JinjaTemplate),
        # A fine-tune of the first generation has the tokens for tools in tokenizer.json only.
        (True, V1, build.MISTRAL_V3, JSON, JinjaTemplate),
    ],
)
def test_the_choice_of_a_tokenizer_and_a_template(
    has_json, model_file, template, tokenizer, kind, tmp_path
):
    made = build.byte_level(plain=["[INST]", "[/INST]"]) if has_json else None
    build.write_checkpoint(tmp_path, made, model_file=model_file, template=template)
    assert type(load_tokenizer(tmp_path)) is tokenizer
    found = chosen(tmp_path)
    assert type(found) is kind
    if template == build.MISTRAL_V3 and kind is InstructTemplate:
        assert found.encode([Message("user", "[INST]")])[:2] == [1, 3]
        assert found.stop_ids == {2}


def test_a_space_before_a_control_token_is_kept(tmp_path):
    """Fine-tunes of the third generation have Mistral's first template."""
    build.write_checkpoint(tmp_path, model_file=build.V3_FILE, template=build.MISTRAL)
    template = chosen(tmp_path)
    assert type(template) is JinjaTemplate
    assert template.encode([Message("user", "[INST]")]).count(3) == 1


def test_a_template_in_a_file_of_its_own_precedes_the_config(tmp_path):
    build.write_checkpoint(tmp_path, build.byte_level(), template=build.MISTRAL)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    tokenizer = load_tokenizer(tmp_path)
    ids = load_template(tmp_path, tokenizer).encode([Message("user", "Hi")])
    assert tokenizer.decode(ids) == "Hi!"


def test_a_base_model_that_wants_no_bos_gets_none(tmp_path):
    build.write_checkpoint(tmp_path, model_file=build.V1_FILE, add_bos_token=False)
    assert chosen(tmp_path).encode([Message("user", "Hi")]) == [15359]


def test_stop_ids_come_from_all_files(tmp_path):
    build.write_checkpoint(
        tmp_path, build.byte_level(), template=build.CHATML, eos_token="<|endoftext|>"
    )
    assert chosen(tmp_path).stop_ids == {0, 2}, "the tokenizer's own, and the end of a turn"
    file = tmp_path / "generation_config.json"
    for value, ids in ((9, {9}), ([9, 10], {9, 10}), (None, set())):
        file.write_text(json.dumps({"eos_token_id": value}))
        assert chosen(tmp_path).stop_ids == {0, 2} | ids


@pytest.mark.parametrize("content", ['{"eos_token_id": "2"}', '{"eos_token_id": [true]}', "[", ""])
def test_a_damaged_generation_config_is_named(content, tmp_path):
    build.write_checkpoint(tmp_path, model_file=build.V1_FILE)
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"generation_config\.json: "):
        chosen(tmp_path)
