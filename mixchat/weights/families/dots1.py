"""dots.llm1, by rednote: scores with a correction choose experts, and the first layer is dense."""

from __future__ import annotations

from typing import Any

from mixchat.base.model_config import ModelConfig
from mixchat.weights.families import config_keys as read
from mixchat.weights.families.family import MLP_WITH_SHARED, Family

_DEFAULTS = {"sliding_window": 4096, "max_window_layers": 62, "first_k_dense_replace": 0}


def _read_config(raw: dict[str, Any]) -> ModelConfig:
    raw = {**_DEFAULTS, **raw}
    keys = read.of_experts(raw, "n_routed_experts")
    # The layers from max_window_layers on have the window. In Qwen2 the layers before that number
    # have it.
    full = read.whole_number(raw, "max_window_layers") if keys.get("sliding_window") else 2**31
    keys = {"layer_types": read.types_of_layers(raw, lambda layer: layer >= full), **keys}
    return ModelConfig(
        **read.shape_of(keys, rope_theta=1e4, rms_norm_eps=1e-6),
        **read.layer_types(keys),
        **read.corrected_router(keys),
        **read.dense_parts(raw),
        norm_topk_prob=read.flag(keys, "norm_topk_prob"),
        qk_norm="head",
        attention_bias=read.flag(keys, "attention_bias"),
    )


DOTS1 = Family("dots1", _read_config, MLP_WITH_SHARED)
