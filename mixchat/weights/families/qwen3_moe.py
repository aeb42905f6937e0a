"""Qwen3-MoE, by Alibaba: Qwen3-30B-A3B, Qwen3-Coder-30B-A3B, Qwen3-235B-A22B."""

from __future__ import annotations

from typing import Any

from mixchat.base.model_config import ModelConfig
from mixchat.weights.families.config_keys import (
    flag,
    no_dense_layers,
    of_experts,
    shape_of,
    sliding_layers,
    with_defaults,
)
from mixchat.weights.families.family import Family, Tensors
from mixchat.weights.families.tensors import MLP_EXPERTS, decoder_tensors


def _read_config(raw: dict[str, Any]) -> ModelConfig:
    keys = with_defaults(of_experts(raw), num_key_value_heads=4, sliding_window=4096)
    no_dense_layers(keys)
    windows = sliding_layers(keys) if flag(keys, "use_sliding_window") else {}
    return ModelConfig(
        **shape_of(keys, rope_theta=1e4, rms_norm_eps=1e-6),
        **windows,
        qk_norm="head",
        norm_topk_prob=flag(keys, "norm_topk_prob"),
        attention_bias=flag(keys, "attention_bias"),
    )


def _tensors(config: ModelConfig) -> Tensors:
    return decoder_tensors(config, MLP_EXPERTS)


QWEN3_MOE = Family("qwen3_moe", _read_config, _tensors)
