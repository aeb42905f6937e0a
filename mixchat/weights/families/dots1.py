"""dots.llm1, by rednote: scores with a correction choose experts, and the first layer is dense."""

from __future__ import annotations

from typing import Any

from mixchat.base.model_config import ModelConfig
from mixchat.weights.families.config_keys import (
    corrected_router,
    dense_parts,
    flag,
    layer_count,
    layer_types,
    of_experts,
    shape_of,
    whole_number,
)
from mixchat.weights.families.family import Family, Tensors
from mixchat.weights.families.tensors import decoder_tensors, mlp_and_shared_experts

_DEFAULTS = {"sliding_window": 4096, "max_window_layers": 62, "first_k_dense_replace": 0}


def _read_config(raw: dict[str, Any]) -> ModelConfig:
    raw = {"num_experts": raw.get("n_routed_experts"), **_DEFAULTS, **raw}
    keys = of_experts(raw)
    full = whole_number(raw, "max_window_layers") if keys.get("sliding_window") else 2**31
    windows = [("full", "sliding")[layer >= full] for layer in range(layer_count(raw))]
    keys = {"layer_types": [f"{kind}_attention" for kind in windows], **keys}
    return ModelConfig(
        **shape_of(keys, rope_theta=1e4, rms_norm_eps=1e-6),
        **layer_types(keys),
        **corrected_router(keys),
        **dense_parts(raw),
        norm_topk_prob=flag(keys, "norm_topk_prob"),
        qk_norm="head",
        attention_bias=flag(keys, "attention_bias"),
    )


def _tensors(config: ModelConfig) -> Tensors:
    return decoder_tensors(config, mlp_and_shared_experts)


DOTS1 = Family("dots1", _read_config, _tensors)
