"""DeepSeek-V2 with its Lite and Coder models, DeepSeek-V3 and R1.

They have latent attention and shared experts. In V2 the experts' weights are probabilities, which
are not normalized. In V3 scores with a correction choose groups of experts. Moonlight has V3's
form.
"""

from __future__ import annotations

from typing import Any

from mixchat.base.errors import CheckpointError
from mixchat.base.model_config import ModelConfig
from mixchat.weights.families import config_keys as read
from mixchat.weights.families.family import MLP_WITH_SHARED, Family

_DEFAULTS = {
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
_V2_DEFAULTS = {
    **_DEFAULTS,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "first_k_dense_replace": 0,
    "moe_intermediate_size": 1407,
    "topk_method": "greedy",
}
_V3_DEFAULTS = {
    **_DEFAULTS,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "num_nextn_predict_layers": 1,
}


def _read_v2(raw: dict[str, Any]) -> ModelConfig:
    raw = {**_V2_DEFAULTS, **raw}
    method = raw["topk_method"]
    if method not in ("greedy", "group_limited_greedy"):
        raise CheckpointError(f"config.json: topk_method {method!r:.80} is not supported")
    if read.flag(read.with_defaults(raw), "norm_topk_prob"):
        raise CheckpointError("config.json: norm_topk_prob is true: such a router does not run")
    return ModelConfig(
        **read.latent_model(raw, rms_norm_eps=1e-6),
        **(read.groups_of_experts(raw) if method != "greedy" else {}),
        norm_topk_prob=False,
        routed_scaling_factor=read.positive_number(raw, "routed_scaling_factor", 1.0),
    )


def _read_v3(raw: dict[str, Any]) -> ModelConfig:
    raw = {**_V3_DEFAULTS, **raw}
    return ModelConfig(
        **read.latent_model(raw, rms_norm_eps=1e-6),
        **read.corrected_router(raw),
        norm_topk_prob=read.flag(read.with_defaults(raw), "norm_topk_prob", True),
        num_nextn_predict_layers=read.whole_number(raw, "num_nextn_predict_layers"),
    )


DEEPSEEK_V2 = Family("deepseek_v2", _read_v2, MLP_WITH_SHARED)
DEEPSEEK_V3 = Family("deepseek_v3", _read_v3, MLP_WITH_SHARED)
