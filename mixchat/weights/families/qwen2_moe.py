"""Qwen2-MoE, by Alibaba: Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B.

A layer also has a shared expert with a gate, which all tokens go through.
"""

from __future__ import annotations

from typing import Any

from mixchat.base.model_config import ModelConfig
from mixchat.weights.families import config_keys as read
from mixchat.weights.families.family import MLP_EXPERTS, Family, with_shared_expert


def _read_config(raw: dict[str, Any]) -> ModelConfig:
    keys = read.with_defaults(
        read.of_experts(raw), shared_expert_intermediate_size=5632, sliding_window=4096
    )
    read.no_dense_layers(keys)
    if read.flag(keys, "use_sliding_window"):
        last = read.positive_int({"max_window_layers": 28, **keys}, "max_window_layers")
        # As in transformers, every other layer before max_window_layers.
        sliding = range(0, last, 2)
        keys = {"layer_types": read.types_of_layers(raw, sliding.__contains__), **keys}
    return ModelConfig(
        **read.shape_of(keys, rope_theta=1e4, rms_norm_eps=1e-6),
        **read.layer_types({"layer_types": [], **keys}),
        shared_expert_intermediate_size=read.positive_int(keys, "shared_expert_intermediate_size"),
        shared_expert_gate=True,
        norm_topk_prob=read.flag(keys, "norm_topk_prob"),
        qkv_bias=read.flag(keys, "qkv_bias", True),
    )


QWEN2_MOE = Family("qwen2_moe", _read_config, with_shared_expert(MLP_EXPERTS, "mlp.shared_expert"))
