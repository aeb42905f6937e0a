"""Qwen3-MoE, by Alibaba: Qwen3-30B-A3B, Qwen3-Coder-30B-A3B, Qwen3-235B-A22B."""

from __future__ import annotations

from typing import Any

from mixchat.base.model_config import ModelConfig
from mixchat.weights.families import config_keys as read
from mixchat.weights.families.family import MLP_EXPERTS, Family


def _read_config(raw: dict[str, Any]) -> ModelConfig:
    keys = read.with_defaults(read.of_experts(raw), num_key_value_heads=4, sliding_window=4096)
    read.no_dense_layers(keys)
    windows = read.sliding_layers(keys) if read.flag(keys, "use_sliding_window") else {}
    return ModelConfig(
        **read.shape_of(keys, rope_theta=1e4, rms_norm_eps=1e-6),
        **windows,
        qk_norm="head",
        norm_topk_prob=read.flag(keys, "norm_topk_prob"),
        attention_bias=read.flag(keys, "attention_bias"),
    )


QWEN3_MOE = Family("qwen3_moe", _read_config, MLP_EXPERTS)
