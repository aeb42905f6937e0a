"""GLM-4 MoE, by Z.ai: GLM-4.5, GLM-4.5-Air, GLM-4.6. Half of a head is rotated.

The layers for predicting several tokens, which follow the others, are left out.
"""

from __future__ import annotations

from typing import Any

from mixchat.base.model_config import ModelConfig
from mixchat.weights.families.config_keys import (
    corrected_router,
    dense_parts,
    flag,
    of_experts,
    shape_of,
    whole_number,
)
from mixchat.weights.families.family import Family, Tensors
from mixchat.weights.families.tensors import decoder_tensors, mlp_and_shared_experts

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
    keys = of_experts({"num_experts": raw["n_routed_experts"], **raw})
    return ModelConfig(
        **shape_of(keys, rope_theta=1e4, rms_norm_eps=1e-5, partial_rotary=True),
        **corrected_router(keys),
        **dense_parts(raw),
        norm_topk_prob=flag(keys, "norm_topk_prob", True),
        qk_norm="head" if flag(keys, "use_qk_norm") else None,
        qkv_bias=flag(keys, "attention_bias"),
        num_nextn_predict_layers=whole_number(raw, "num_nextn_predict_layers"),
    )


def _tensors(config: ModelConfig) -> Tensors:
    return decoder_tensors(config, mlp_and_shared_experts)


GLM4_MOE = Family("glm4_moe", _read_config, _tensors)
