"""GLM-4 MoE Lite, by Z.ai: GLM-4.7-Flash. Latent attention, and a router like DeepSeek-V3's.

The layers for predicting several tokens, which follow the others, are left out.
"""

from __future__ import annotations

from typing import Any

from mixchat.base.errors import CheckpointError
from mixchat.base.model_config import ModelConfig
from mixchat.weights.families import config_keys as read
from mixchat.weights.families.family import MLP_WITH_SHARED, Family, latent_attention

_DEFAULTS = {
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
    raw = {"first_k_dense_replace": _dense_layers(raw), **read.with_latent_heads(raw)}
    keys = read.of_experts(raw, "n_routed_experts")
    return ModelConfig(
        **read.shape_of(keys, rope_theta=1e4, rms_norm_eps=1e-5),
        **read.corrected_router(keys),
        **read.dense_parts(raw),
        **read.latent_attention(raw),
        norm_topk_prob=read.flag(keys, "norm_topk_prob", True),
        num_nextn_predict_layers=read.whole_number(raw, "num_nextn_predict_layers"),
    )


def _dense_layers(raw: dict[str, Any]) -> int:
    """Return how many layers are dense, which have to be the first ones."""
    types, layers = raw.get("mlp_layer_types"), read.layer_count(raw)
    if types is None:
        return 1
    dense = types.count("dense") if isinstance(types, list) else 0
    if types != ["dense"] * dense + ["sparse"] * (layers - dense):
        raise CheckpointError(
            f"config.json: mlp_layer_types is {types!r:.80}: dense layers after layers with "
            "experts do not run"
        )
    return dense


GLM4_MOE_LITE = Family(
    "glm4_moe_lite", _read_config, MLP_WITH_SHARED, {"latent_attention": latent_attention}
)
