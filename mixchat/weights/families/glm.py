"""GLM-4 MoE, by Z.ai: GLM-4.5, GLM-4.5-Air, GLM-4.6, and GLM-4.7-Flash, which is GLM-4 MoE Lite.

Both have a router like DeepSeek-V3's. Half of a head is rotated. Lite has latent attention.
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
_LITE_DEFAULTS = {
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "q_lora_rank": 768,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "routed_scaling_factor": 1.8,
    "num_nextn_predict_layers": 1,
}


def _read_config(raw: dict[str, Any]) -> ModelConfig:
    raw = {**_DEFAULTS, **raw}
    keys = read.of_experts(raw, "n_routed_experts")
    return ModelConfig(
        **read.shape_of(keys, rope_theta=1e4, rms_norm_eps=1e-5, partial_rotary=True),
        **read.corrected_router(raw),
        **read.dense_parts(raw),
        norm_topk_prob=read.flag(keys, "norm_topk_prob", True),
        qk_norm="head" if read.flag(keys, "use_qk_norm") else None,
        qkv_bias=read.flag(keys, "attention_bias"),
        num_nextn_predict_layers=read.whole_number(raw, "num_nextn_predict_layers"),
    )


def _read_lite(raw: dict[str, Any]) -> ModelConfig:
    raw = {**_LITE_DEFAULTS, **raw}
    raw = {"first_k_dense_replace": read.first_dense_layers(raw), **raw}
    return ModelConfig(
        **read.latent_model(raw, rms_norm_eps=1e-5),
        **read.corrected_router(raw),
        norm_topk_prob=read.flag(read.with_defaults(raw), "norm_topk_prob", True),
        num_nextn_predict_layers=read.whole_number(raw, "num_nextn_predict_layers"),
    )


GLM4_MOE = Family("glm4_moe", _read_config, MLP_WITH_SHARED)
GLM4_MOE_LITE = Family("glm4_moe_lite", _read_lite, MLP_WITH_SHARED)
