import json
from pathlib import Path
from typing import Any

import pytest

from mixchat.base.errors import CheckpointError
from mixchat.base.model_config import Context, ModelConfig, advised_length, advised_sampling

MIXTRAL = {
    "model_type": "mixtral",
    "hidden_act": "silu",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def test_reads_mixtrals_own_config() -> None:
    config = ModelConfig.from_dict(MIXTRAL)
    assert config.head_dim == 128
    assert config.rope_theta == 1e6
    assert config.sliding_window is None
    assert config.eos_token_ids == (2,)
    assert not config.tie_word_embeddings


def test_reads_the_keys_that_transformers_5_writes() -> None:
    raw = {key: value for key, value in MIXTRAL.items() if key != "rope_theta"}
    config = ModelConfig.from_dict(
        {**raw, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}, "head_dim": 64}
    )
    assert config.rope_theta == 1e4
    assert config.head_dim == 64


def test_eos_may_be_a_list() -> None:
    config = ModelConfig.from_dict({**MIXTRAL, "eos_token_id": [2, 32000]})
    assert config.eos_token_ids == (2, 32000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "not a Mixtral checkpoint"),
        ({"model_type": None}, "not a Mixtral checkpoint"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "4096"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 4097, "head_dim": 128}, "odd"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"num_hidden_layers": 2**40}, "num_hidden_layers"),
        ({"num_key_value_heads": 7}, "cannot share"),
        ({"head_dim": 127}, "odd"),
        ({"num_experts_per_tok": 9}, "experts per token"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope type 'yarn'"),
        ({"rope_scaling": [1]}, "rope"),
        ({"rope_scaling": {"factor": 4}}, "rope"),
        ({"rope_parameters": "default"}, "rope_parameters"),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear"}},
            "rope type 'linear'",
        ),
        ({"rope_theta": "big"}, "rope_theta"),
        ({"rms_norm_eps": []}, "rms_norm_eps"),
        ({"sliding_window": -5}, "sliding_window"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"num_local_experts": 0}, "num_local_experts"),
        ({"num_experts_per_tok": False}, "num_experts_per_tok"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id"),
    ],
)
def test_an_error_says_what_is_wrong(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_dict({**MIXTRAL, **change})


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000, "\xff"])
def test_a_file_that_is_not_an_object_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ModelConfig.from_file(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: the file is missing"):
        ModelConfig.from_file(tmp_path / "config.json")


def test_reads_a_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MIXTRAL))
    assert ModelConfig.from_file(path) == ModelConfig.from_dict(MIXTRAL)


def test_a_directory_in_place_of_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        ModelConfig.from_file(tmp_path / "config.json")


def test_recommended_sampling_is_read_where_it_is_a_number(tmp_path: Path) -> None:
    assert advised_sampling(tmp_path) == {}
    advice = {"temperature": 0.2, "top_p": "0.9", "top_k": 5, "min_p": True}
    (tmp_path / "generation_config.json").write_text(
        json.dumps({**advice, "repetition_penalty": 1.1, "eos_token_id": 2})
    )
    assert advised_sampling(tmp_path) == {"temperature": 0.2, "top_k": 5, "repeat_penalty": 1.1}


def test_a_file_that_is_far_too_large_is_not_read_to_its_end(tmp_path: Path) -> None:
    """It was read whole, however large: a config.json of 16 GB ended in a killed process."""
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(10**12)  # a hole: it takes no disk
    with pytest.raises(CheckpointError, match=r"config\.json: larger than 100 MB"):
        ModelConfig.from_file(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("advice", "length"),
    [
        ({}, None),
        ({"max_new_tokens": 700, "max_length": 900}, 700),
        ({"max_length": 900}, 900),
        ({"max_new_tokens": "700"}, None),
        ({"max_new_tokens": 0}, None),
        ({"max_new_tokens": True}, None),
    ],
)
def test_the_recommended_length_of_an_answer_is_read_where_it_is_a_number(
    tmp_path: Path, advice: dict[str, object], length: int | None
) -> None:
    assert advised_length(tmp_path) is None
    (tmp_path / "generation_config.json").write_text(json.dumps(advice))
    assert advised_length(tmp_path) == length


@pytest.mark.parametrize(
    ("context", "tokens", "hint"),
    [
        (Context(4096, 32768), 5000, "--ctx-size can be up to 32768."),
        (Context(4096, 32768), 32768, "Shorten it: this model reads 32767 tokens at most."),
        (Context(8192, 8192), 9000, "Shorten it: this model reads 8191 tokens at most."),
    ],
)
def test_a_larger_context_is_only_offered_where_it_would_be_large_enough(context, tokens, hint):
    """For a prompt longer than the largest context, the hint advised a larger --ctx-size."""
    error = context.prompt_too_long(tokens)
    assert str(error).startswith(f"the prompt is too long: {tokens} tokens, the context holds")
    assert error.hint == hint
