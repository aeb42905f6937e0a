"""DeepSeek-V3 and R1: latent attention, and scores with a correction that choose groups of experts.

Moonlight has the same form. The layers for predicting several tokens, which follow the others, are
left out.
"""

from __future__ import annotations

from typing import Any

from mixchat.base.model_config import ModelConfig
from mixchat.weights.families import config_keys as read
from mixchat.weights.families.family import MLP_WITH_SHARED, Family, latent_attention

_DEFAULTS = {
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "num_nextn_predict_layers": 1,
}


def _read_config(raw: dict[str, Any]) -> ModelConfig:
    raw = read.with_latent_heads({**_DEFAULTS, **raw})
    keys = read.of_experts(raw, "n_routed_experts")
    return ModelConfig(
        **read.shape_of(keys, rope_theta=1e4, rms_norm_eps=1e-6),
        **read.corrected_router(keys),
        **read.dense_parts(raw),
        **read.latent_attention(raw),
        norm_topk_prob=read.flag(keys, "norm_topk_prob", True),
        num_nextn_predict_layers=read.whole_number(raw, "num_nextn_predict_layers"),
    )


DEEPSEEK_V3 = Family(
    "deepseek_v3", _read_config, MLP_WITH_SHARED, {"latent_attention": latent_attention}
)
