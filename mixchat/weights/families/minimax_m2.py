"""MiniMax-M2, by MiniMax: M2 and M2.1. They are published in FP8.

The layers for predicting several tokens, which follow the others, are left out.
"""

from __future__ import annotations

from typing import Any

from mixchat.base.model_config import ModelConfig
from mixchat.weights.families import config_keys as read
from mixchat.weights.families.family import Family, separate_experts, with_correction

_EXPERTS = with_correction(
    separate_experts("block_sparse_moe", "w1", "w2", "w3"),
    "block_sparse_moe.e_score_correction_bias",
)


def _read_config(raw: dict[str, Any]) -> ModelConfig:
    keys = read.with_defaults(
        raw, num_key_value_heads=8, head_dim=128, num_local_experts=256, num_experts_per_tok=8
    )
    if rotated := read.whole_number(keys, "rotary_dim"):
        keys = {"partial_rotary_factor": rotated / read.positive_int(keys, "head_dim"), **keys}
    return ModelConfig(
        **read.shape_of(keys, rope_theta=5e6, rms_norm_eps=1e-6, partial_rotary=True),
        **read.corrected_router({}),
        qk_norm="projection",
        num_nextn_predict_layers=read.whole_number(keys, "num_mtp_modules"),
    )


MINIMAX_M2 = Family("minimax_m2", _read_config, _EXPERTS)
