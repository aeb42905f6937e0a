"""DeepSeek-V2 and its Lite and Coder models: latent attention and shared experts.

Probabilities weigh the experts, and are not normalized.
"""

from __future__ import annotations

from typing import Any

from mixchat.base.errors import CheckpointError
from mixchat.base.model_config import ModelConfig
from mixchat.weights.families import config_keys as read
from mixchat.weights.families.family import MLP_WITH_SHARED, Family, latent_attention

_DEFAULTS = {
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "first_k_dense_replace": 0,
    "moe_intermediate_size": 1407,
    "topk_method": "greedy",
}


def _read_config(raw: dict[str, Any]) -> ModelConfig:
    raw = read.with_latent_heads({**_DEFAULTS, **raw})
    method = raw["topk_method"]
    if method not in ("greedy", "group_limited_greedy"):
        raise CheckpointError(f"config.json: topk_method {method!r:.80} is not supported")
    if read.flag(read.with_defaults(raw), "norm_topk_prob"):
        raise CheckpointError("config.json: norm_topk_prob is true: such a router does not run")
    keys = read.of_experts(raw, "n_routed_experts")
    return ModelConfig(
        **read.shape_of(keys, rope_theta=1e4, rms_norm_eps=1e-6),
        **(read.groups_of_experts(raw) if method != "greedy" else {}),
        **read.dense_parts(raw),
        **read.latent_attention(raw),
        norm_topk_prob=False,
        routed_scaling_factor=read.positive_number(raw, "routed_scaling_factor", 1.0),
    )


DEEPSEEK_V2 = Family(
    "deepseek_v2", _read_config, MLP_WITH_SHARED, {"latent_attention": latent_attention}
)
