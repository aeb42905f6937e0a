"""OLMoE, by the Allen Institute for AI: OLMoE-1B-7B."""

from __future__ import annotations

from typing import Any

from mixchat.base.model_config import ModelConfig
from mixchat.weights.families import config_keys as read
from mixchat.weights.families.family import MLP_EXPERTS, Family


def _read_config(raw: dict[str, Any]) -> ModelConfig:
    keys = read.of_experts(raw)
    return ModelConfig(
        **read.shape_of(keys, rope_theta=1e4, rms_norm_eps=1e-5),
        qk_norm="projection",
        clip_qkv=read.positive_number(keys, "clip_qkv", 0.0) if "clip_qkv" in keys else None,
        norm_topk_prob=read.flag(keys, "norm_topk_prob"),
        attention_bias=read.flag(keys, "attention_bias"),
    )


OLMOE = Family("olmoe", _read_config, MLP_EXPERTS)
