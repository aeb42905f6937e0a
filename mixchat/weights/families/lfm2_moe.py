"""LFM2-MoE, by Liquid AI: LFM2-8B-A1B, LFM2-24B-A2B.

Most layers are short gated convolutions. The first layers are dense.
"""

from __future__ import annotations

from typing import Any

from mixchat.base.errors import CheckpointError
from mixchat.base.model_config import ModelConfig
from mixchat.weights.families import config_keys as read
from mixchat.weights.families.family import (
    Family,
    attention,
    separate_experts,
    short_conv,
    with_correction,
)

_DEFAULTS = {
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 1792,
    "intermediate_size": 7168,
    "num_key_value_heads": 8,
    "num_dense_layers": 2,
    "norm_eps": 1e-5,
    "conv_L_cache": 3,
}


def _read_config(raw: dict[str, Any]) -> ModelConfig:
    raw = read.with_defaults(raw, **_DEFAULTS)
    if read.flag(raw, "conv_bias"):
        raise CheckpointError("config.json: conv_bias is not supported")
    # The keys of LFM2 itself take precedence over other models' keys.
    own = {"rms_norm_eps": raw["norm_eps"]}
    own["tie_word_embeddings"] = raw.get("tie_embedding", raw.get("tie_word_embeddings", True))
    keys = {**read.of_experts(raw), **own}
    return ModelConfig(
        **read.shape_of(keys, rope_theta=1e6, rms_norm_eps=1e-5),
        **read.layer_types(keys),
        **read.dense_parts(raw, first="num_dense_layers"),
        conv_L_cache=read.positive_int(raw, "conv_L_cache"),
        qk_norm="head",
        scoring_func="sigmoid",
        norm_topk_prob=read.flag(raw, "norm_topk_prob", True),
        e_score_correction_bias=read.flag(raw, "use_expert_bias", True),
        routed_scaling_factor=read.positive_number(raw, "routed_scaling_factor", 1.0),
    )


LFM2_MOE = Family(
    "lfm2_moe",
    _read_config,
    with_correction(separate_experts("feed_forward", "w1", "w2", "w3"), "feed_forward.expert_bias"),
    {"attention": attention(), "conv": short_conv},
    {
        "model.norm.": "model.embedding_norm.",
        "input_layernorm": "operator_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.o_proj": "self_attn.out_proj",
        "self_attn.q_norm": "self_attn.q_layernorm",
        "self_attn.k_norm": "self_attn.k_layernorm",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
    },
)
