"""Qwen2-MoE, by Alibaba: Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B.

A layer also has a shared expert with a gate, which all tokens go through.
"""

from __future__ import annotations

from typing import Any

from mixchat.base.model_config import ModelConfig
from mixchat.weights.families.config_keys import (
    flag,
    layer_count,
    layer_types,
    no_dense_layers,
    of_experts,
    positive_int,
    shape_of,
    with_defaults,
)
from mixchat.weights.families.family import Family, Tensors
from mixchat.weights.families.tensors import MLP_EXPERTS, decoder_tensors, shared_expert

_KINDS = "full_attention", "sliding_attention"


def _read_config(raw: dict[str, Any]) -> ModelConfig:
    keys = with_defaults(of_experts(raw), shared_expert_intermediate_size=5632, sliding_window=4096)
    no_dense_layers(keys)
    if flag(keys, "use_sliding_window"):
        last = min(
            layer_count(raw), positive_int({"max_window_layers": 28, **keys}, "max_window_layers")
        )
        sliding = {*range(0, last, 2)}
        keys = {
            "layer_types": [_KINDS[layer in sliding] for layer in range(layer_count(raw))],
            **keys,
        }
    return ModelConfig(
        **shape_of(keys, rope_theta=1e4, rms_norm_eps=1e-6),
        **layer_types({"layer_types": [], **keys}),
        shared_expert_intermediate_size=positive_int(keys, "shared_expert_intermediate_size"),
        shared_expert_gate=True,
        norm_topk_prob=flag(keys, "norm_topk_prob"),
        qkv_bias=flag(keys, "qkv_bias", True),
    )


def _layer(config: ModelConfig, prefix: str) -> Tensors:
    yield from MLP_EXPERTS(config, prefix)
    yield from shared_expert(config, prefix, "mlp.shared_expert")


def _tensors(config: ModelConfig) -> Tensors:
    return decoder_tensors(config, _layer)


QWEN2_MOE = Family("qwen2_moe", _read_config, _tensors)
