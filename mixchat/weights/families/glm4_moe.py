"""GLM-4 MoE, by Z.ai: GLM-4.5, GLM-4.5-Air, GLM-4.6. Half of a head is rotated.

The layers for predicting several tokens, which follow the others, are left out.
"""

from __future__ import annotations

from typing import Any

from mixchat.base.model_config import ModelConfig
from mixchat.weights.families import config_keys as read
from mixchat.weights.families.family import MLP_WITH_SHARED, Family

_DEFAULTS = {
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "num_key_value_heads": 8,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 0.5,
}


def _read_config(raw: dict[str, Any]) -> ModelConfig:
    raw = {**_DEFAULTS, **raw}
    keys = read.of_experts(raw, "n_routed_experts")
    return ModelConfig(
        **read.shape_of(keys, rope_theta=1e4, rms_norm_eps=1e-5, partial_rotary=True),
        **read.corrected_router(keys),
        **read.dense_parts(raw),
        norm_topk_prob=read.flag(keys, "norm_topk_prob", True),
        qk_norm="head" if read.flag(keys, "use_qk_norm") else None,
        qkv_bias=read.flag(keys, "attention_bias"),
        num_nextn_predict_layers=read.whole_number(raw, "num_nextn_predict_layers"),
    )


GLM4_MOE = Family("glm4_moe", _read_config, MLP_WITH_SHARED)
