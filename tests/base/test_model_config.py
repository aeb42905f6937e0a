import json

import pytest

from mixchat.base.errors import CheckpointError
from mixchat.base.model_config import ModelConfig, RopeParameters, advised_length, advised_sampling


def test_recommended_sampling_is_read_where_it_is_a_number(tmp_path):
    assert advised_sampling(tmp_path) == {}
    advice = {"temperature": 0.2, "top_p": "0.9", "top_k": 5, "min_p": True}
    (tmp_path / "generation_config.json").write_text(
        json.dumps({**advice, "repetition_penalty": 1.1, "eos_token_id": 2})
    )
    assert advised_sampling(tmp_path) == {"temperature": 0.2, "top_k": 5, "repeat_penalty": 1.1}


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
def test_the_recommended_length_of_an_answer_is_read_where_it_is_a_number(tmp_path, advice, length):
    assert advised_length(tmp_path) is None
    (tmp_path / "generation_config.json").write_text(json.dumps(advice))
    assert advised_length(tmp_path) == length


@pytest.mark.parametrize(
    ("hidden", "inner", "fits"), [(2880, 2880, True), (64, 2, True), (96, 3, False)]
)
def test_experts_with_biases_of_odd_sizes_are_refused(hidden, inner, fits):
    sizes = 97, hidden, inner, 1, 4, 2, 16, 4, 2, 128, 1e-5, RopeParameters(1e4)
    ModelConfig("gpt_oss", *sizes).check()
    config = ModelConfig("gpt_oss", *sizes, moe_bias=True)
    if fits:
        config.check()
    else:
        with pytest.raises(CheckpointError, match=rf"experts with biases .* \({inner}\)"):
            config.check()
