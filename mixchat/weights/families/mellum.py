"""Mellum2, by JetBrains. The heads for predicting several tokens (`mtp.`) are left out."""

from __future__ import annotations

from typing import Any

from mixchat.base.errors import CheckpointError
from mixchat.base.model_config import ModelConfig
from mixchat.weights.families import config_keys as read
from mixchat.weights.families.family import MLP_EXPERTS, Family

_ROPES = {
    "full_attention": {"rope_type": "default", "rope_theta": 5e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


def _read_config(raw: dict[str, Any]) -> ModelConfig:
    keys = read.with_defaults(
        read.of_experts(raw),
        num_key_value_heads=4,
        head_dim=128,
        sliding_window=1024,
        layer_types=["full_attention"] * read.layer_count(raw),
        rope_parameters=_ROPES,
    )
    layers = keys.get("mlp_layer_types", [])
    if not isinstance(layers, list) or any(layer != "sparse" for layer in layers):
        raise CheckpointError(
            f"config.json: mlp_layer_types is {layers!r:.80}: models with dense layers do not run"
        )
    return ModelConfig(
        **read.shape_of(keys, rope_theta=1e4, rms_norm_eps=1e-6),
        **read.layer_types(keys),
        qk_norm="head",
        norm_topk_prob=read.flag(keys, "norm_topk_prob", True),
        attention_bias=read.flag(keys, "attention_bias"),
    )


MELLUM = Family("mellum", _read_config, MLP_EXPERTS)
