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

ORIGINAL = "original_max_position_embeddings"
YARN = {"type": "yarn", "factor": 4}
LLAMA3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
LONGROPE = {"rope_type": "longrope", "factor": 2, "short_factor": [1], "long_factor": [1]}


def test_reads_mixtrals_own_config():
    config = read_config(MIXTRAL)
    assert config.head_dim == 128
    assert config.rope_parameters.rope_theta == 1e6
    assert config.sliding_window is None
    assert config.eos_token_ids == (2,)
    assert not config.tie_word_embeddings


def test_reads_the_keys_that_transformers_5_writes():
    raw = {key: value for key, value in MIXTRAL.items() if key != "rope_theta"}
    config = read_config(
        {**raw, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}, "head_dim": 64}
    )
    assert config.rope_parameters.rope_theta == 1e4
    assert config.head_dim == 64


def test_a_factor_that_is_missing_follows_from_the_two_contexts():
    rope = {"type": "yarn", "factor": None, ORIGINAL: 4096}
    assert read_config({**MIXTRAL, "rope_scaling": rope}).rope_parameters.factor == 8
    rope = {**LONGROPE, ORIGINAL: 16384}
    del rope["factor"]
    read = read_config({**MIXTRAL, "rope_scaling": rope, "head_dim": 2})
    assert read.rope_parameters.factor == 2


def test_the_older_key_precedes_as_in_transformers():
    newer = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    rope = read_config({**MIXTRAL, "rope_scaling": YARN, "rope_parameters": newer}).rope_parameters
    assert (rope.rope_type, rope.factor, rope.rope_theta) == ("yarn", 4, 1e6)


def test_an_original_context_outside_the_rope_precedes_as_in_transformers():
    raw = {**MIXTRAL, "rope_scaling": {**YARN, ORIGINAL: 4096}, ORIGINAL: 8192}
    assert read_config(raw).rope_parameters.original_max_position_embeddings == 8192


def test_keys_of_another_type_make_no_difference():
    rope = {"rope_type": "linear", "factor": 2.0, "mscale": 3.0, "truncate": False}
    plain = {"rope_type": "linear", "factor": 2.0}
    assert read_config({**MIXTRAL, "rope_scaling": rope}) == (
        read_config({**MIXTRAL, "rope_scaling": plain})
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "does not run"),
        ({"model_type": ["llama"]}, "does not run"),
        ({"model_type": {"a": "llama"}}, "does not run"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"hidden_size": "4096"}, "hidden_size"),
        ({"hidden_size": 4097, "head_dim": 128}, "odd"),
        ({"num_hidden_layers": 2**40}, "num_hidden_layers"),
        ({"num_hidden_layers": 2**30, "sliding_window": 9}, "1073741824 layers"),
        ({"num_key_value_heads": 7}, "cannot share"),
        ({"head_dim": 127}, "odd"),
        ({"num_experts_per_tok": 9}, "experts per token"),
        ({"rope_scaling": {"type": "su", "factor": 4}}, "rope type 'su' is not supported"),
        ({"rope_scaling": {"type": ["yarn"]}}, "rope type"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"rope_scaling": {"factor": 4}}, "no rope_type"),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor 0.5"),
        ({"rope_scaling": {"type": "linear", "factor": 1e9}}, "factor 1e"),
        ({"rope_scaling": {"type": "dynamic", "factor": "4"}}, "factor is '4'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4}, "head_dim": 2}, "head_dim above 2"),
        ({"rope_scaling": YARN, "rope_theta": 1}, "rope_theta above 1"),
        ({"rope_scaling": {**YARN, "beta_fast": 1, "beta_slow": 2}}, "beta_fast"),
        ({"rope_scaling": {**YARN, "attention_factor": -1}}, "attention_factor"),
        ({"rope_scaling": {**YARN, "truncate": 1}}, "truncate"),
        ({"rope_scaling": {**YARN, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": {**YARN, ORIGINAL: 2.5}}, ORIGINAL),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "llama3", "factor": 8}}, "low_freq_factor is None"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1}}, "high_freq_factor above"),
        ({"rope_scaling": LONGROPE}, "64 numbers"),
        ({"rope_scaling": {**LONGROPE, "short_factor": None}}, "short_factor is None"),
        ({"rope_scaling": {**LONGROPE, ORIGINAL: 1}, "head_dim": 2}, "above 1 token"),
        ({"rope_scaling": {**LONGROPE, "long_factor": [1, "2"]}}, "long_factor is '2'"),
        ({"rope_parameters": "default"}, "rope_parameters"),
        ({"rope_parameters": {"full_attention": YARN, "sliding_attention": 1}}, "sliding"),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear"}},
            "factor is None",
        ),
        ({"rope_theta": "big"}, "rope_theta"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id"),
    ],
)
def test_an_error_says_what_is_wrong(change, message):
    with pytest.raises(CheckpointError, match=message):
        read_config({**MIXTRAL, **change})


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000, "\xff"])
def test_a_file_that_is_not_an_object_is_refused(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config_file(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json: the file is missing"):
        read_config_file(tmp_path / "config.json")


def test_a_file_that_is_far_too_large_is_not_read_to_its_end(tmp_path):
    """It was read whole, however large: a config.json of 16 GB ended in a killed process."""
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(10**12)  # a hole: it takes no disk
    with pytest.raises(CheckpointError, match=r"config\.json: larger than 100 MB"):
        read_config_file(tmp_path / "config.json")
