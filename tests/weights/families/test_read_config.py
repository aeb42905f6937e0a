import json
from pathlib import Path
from typing import Any

import pytest

from mixchat.base.errors import CheckpointError
from mixchat.weights.families.read_config import read_config, read_config_file

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
    config = read_config(MIXTRAL)
    assert config.head_dim == 128
    assert config.rope_parameters.rope_theta == 1e6
    assert config.sliding_window is None
    assert config.eos_token_ids == (2,)
    assert not config.tie_word_embeddings


def test_reads_the_keys_that_transformers_5_writes() -> None:
    raw = {key: value for key, value in MIXTRAL.items() if key != "rope_theta"}
    config = read_config(
        {**raw, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}, "head_dim": 64}
    )
    assert config.rope_parameters.rope_theta == 1e4
    assert config.head_dim == 64


def test_eos_may_be_a_list() -> None:
    config = read_config({**MIXTRAL, "eos_token_id": [2, 32000]})
    assert config.eos_token_ids == (2, 32000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "does not run"),
        ({"model_type": None}, "does not run"),
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
        read_config({**MIXTRAL, **change})


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000, "\xff"])
def test_a_file_that_is_not_an_object_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config_file(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: the file is missing"):
        read_config_file(tmp_path / "config.json")


def test_reads_a_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MIXTRAL))
    assert read_config_file(path) == read_config(MIXTRAL)


def test_a_directory_in_place_of_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
        read_config_file(tmp_path / "config.json")


def test_a_file_that_is_far_too_large_is_not_read_to_its_end(tmp_path: Path) -> None:
    """It was read whole, however large: a config.json of 16 GB ended in a killed process."""
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(10**12)  # a hole: it takes no disk
    with pytest.raises(CheckpointError, match=r"config\.json: larger than 100 MB"):
        read_config_file(tmp_path / "config.json")
