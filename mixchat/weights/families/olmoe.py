"""OLMoE, by the Allen Institute for AI: OLMoE-1B-7B."""

from __future__ import annotations

from typing import Any

from mixchat.base.model_config import ModelConfig
from mixchat.weights.families.config_keys import flag, of_experts, positive_number, shape_of
from mixchat.weights.families.family import Family, Tensors
from mixchat.weights.families.tensors import MLP_EXPERTS, decoder_tensors


def _read_config(raw: dict[str, Any]) -> ModelConfig:
    keys = of_experts(raw)
    return ModelConfig(
        **shape_of(keys, rope_theta=1e4, rms_norm_eps=1e-5),
        qk_norm="projection",
        clip_qkv=positive_number(keys, "clip_qkv", 0.0) if "clip_qkv" in keys else None,
        norm_topk_prob=flag(keys, "norm_topk_prob"),
        attention_bias=flag(keys, "attention_bias"),
    )


def _tensors(config: ModelConfig) -> Tensors:
    return decoder_tensors(config, MLP_EXPERTS)


OLMOE = Family("olmoe", _read_config, _tensors)
