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
from mixchat.text.template import CompletionTemplate, InstructTemplate


def chosen(directory: Path) -> Any:
    return load_template(directory, load_tokenizer(directory))


@pytest.mark.parametrize(
    "template", [build.MISTRAL, build.MISTRAL.replace("'[INST] '", "' [INST] '")]
)
def test_mistrals_own_template_is_built_from_ids(template, tmp_path):
    build.write_checkpoint(
        tmp_path, build.byte_level(), model_file=build.V1_FILE, template=template
    )
    assert type(chosen(tmp_path)) is InstructTemplate


@pytest.mark.parametrize("template", [build.CHATML, build.LLAMA2, build.ALPACA])
@pytest.mark.parametrize("model_file", [build.V1_FILE, None])
def test_another_template_is_rendered(template, model_file, tmp_path):
    build.write_checkpoint(tmp_path, build.byte_level(), model_file=model_file, template=template)
    assert type(chosen(tmp_path)) is JinjaTemplate


@pytest.mark.parametrize("with_json", [True, False])
def test_mistrals_third_generation_is_built_from_ids(with_json, tmp_path):
    tokenizer = build.byte_level() if with_json else None
    build.write_checkpoint(tmp_path, tokenizer, model_file=build.V3_FILE, template=build.MISTRAL_V3)
    template = chosen(tmp_path)
    assert type(template) is InstructTemplate
    assert template.encode([Message("user", "[INST]")])[:2] == [1, 3]
    assert template.stop_ids == {2}


def test_a_template_for_tools_needs_a_tokenizer_with_their_tokens(tmp_path):
    """A fine-tune of the first generation has the tokens in tokenizer.json only."""
    build.write_checkpoint(
        tmp_path,
        build.byte_level(plain=["[INST]", "[/INST]"]),
        model_file=build.V1_FILE,
        template=build.MISTRAL_V3,
    )
    assert type(load_tokenizer(tmp_path)) is JsonTokenizer
    assert type(chosen(tmp_path)) is JinjaTemplate


def test_a_space_before_a_control_token_is_kept(tmp_path):
    """Fine-tunes of the third generation have Mistral's first template."""
    build.write_checkpoint(tmp_path, model_file=build.V3_FILE, template=build.MISTRAL)
    template = chosen(tmp_path)
    assert type(template) is JinjaTemplate
    assert template.encode([Message("user", "[INST]")]).count(3) == 1


def test_no_template_means_a_base_model(checkpoints):
    assert type(chosen(checkpoints["spm"])) is CompletionTemplate


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
