"""ERNIE 4.5, by Baidu: ERNIE-4.5-21B-A3B, ERNIE-4.5-300B-A47B.

Probabilities with a correction choose experts. transformers divides their sum by `moe_norm_min` if
it is smaller, which is 1e-12.
"""

from __future__ import annotations

from typing import Any

from mixchat.base.errors import CheckpointError
from mixchat.base.model_config import ModelConfig
from mixchat.weights.families import config_keys as read
from mixchat.weights.families.family import (
    MLP_EXPERTS,
    Family,
    attention,
    with_correction,
    with_shared_expert,
)

_EXPERTS = with_shared_expert(
    with_correction(MLP_EXPERTS, "mlp.moe_statics.e_score_correction_bias", 1), "mlp.shared_experts"
)
_DEFAULTS = {
    "moe_num_experts": 64,
    "moe_k": 6,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
}


def _read_config(raw: dict[str, Any]) -> ModelConfig:
    raw = read.with_defaults(raw, **_DEFAULTS)
    # A config.json could have dense layers among others. In the published models they come first.
    last = read.layer_count(raw) - 1
    for key, usual in (("moe_layer_interval", (1,)), ("moe_layer_end_index", (-1, last))):
        if raw.get(key, usual[0]) not in usual:
            raise CheckpointError(
                f"config.json: {key} is {raw[key]!r:.80}: dense layers after layers with experts "
                "do not run"
            )
    if read.flag(raw, "use_bias"):
        raise CheckpointError("config.json: use_bias is true: models with these biases do not run")
    keys = read.of_experts({"num_experts_per_tok": raw["moe_k"], **raw}, "moe_num_experts")
    return ModelConfig(
        **read.shape_of(keys, rope_theta=5e5, rms_norm_eps=1e-5),
        **read.dense_parts(raw, "moe_num_shared_experts", "moe_layer_start_index"),
        e_score_correction_bias=True,
    )


ERNIE4_5_MOE = Family(
    "ernie4_5_moe", _read_config, _EXPERTS, {"attention": attention(rotates_neighbours=True)}
)
