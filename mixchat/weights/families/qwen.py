"""Alibaba's families.

- Qwen2-MoE: Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B. A layer also has a shared expert with a gate, which
  all tokens go through.
- Qwen3-MoE: Qwen3-30B-A3B, Qwen3-Coder-30B-A3B, Qwen3-235B-A22B
- Qwen3-Next: Qwen3-Next-80B-A3B, Qwen3-Coder-Next. Three of four layers are gated DeltaNets. The
  others attend, and their output has a gate. The shared expert is as in Qwen2-MoE.
- Qwen3.5-MoE: Qwen3.6-35B-A3B, Qwen3.5-122B-A10B, the text part alone. It differs from Qwen3-Next
  in its tensors' names.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mixchat.base.model_config import ModelConfig
from mixchat.weights.families import config_keys as read
from mixchat.weights.families.family import (
    MLP_EXPERTS,
    Family,
    Slice,
    Tensors,
    attention,
    delta_net,
    with_shared_expert,
)

_NEXT_DEFAULTS = {
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "partial_rotary_factor": 0.25,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}


def _read_qwen2(raw: dict[str, Any]) -> ModelConfig:
    keys = read.with_defaults(
        read.of_experts(raw), shared_expert_intermediate_size=5632, sliding_window=4096
    )
    read.refuse_dense_layers(keys)
    if read.flag(keys, "use_sliding_window"):
        last = read.positive_int({"max_window_layers": 28, **keys}, "max_window_layers")
        # As in transformers, every second layer before max_window_layers has the window.
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


def _read_qwen3(raw: dict[str, Any]) -> ModelConfig:
    keys = read.with_defaults(read.of_experts(raw), num_key_value_heads=4, sliding_window=4096)
    read.refuse_dense_layers(keys)
    windows = read.sliding_layers(keys) if read.flag(keys, "use_sliding_window") else {}
    return ModelConfig(
        **read.shape_of(keys, rope_theta=1e4, rms_norm_eps=1e-6),
        **windows,
        qk_norm="head",
        norm_topk_prob=read.flag(keys, "norm_topk_prob"),
        attention_bias=read.flag(keys, "attention_bias"),
    )


def _read_next(raw: dict[str, Any], **defaults: Any) -> ModelConfig:
    """Read a config.json of DeltaNets and attention, with these defaults and Qwen3-Next's."""
    keys = read.of_experts(read.with_defaults(raw, **{**_NEXT_DEFAULTS, **defaults}))
    read.refuse_dense_layers(keys)
    every = read.positive_int({"full_attention_interval": 4, **keys}, "full_attention_interval")
    layers = range(1, read.layer_count(keys) + 1)
    types = ["linear_attention" if layer % every else "full_attention" for layer in layers]
    linear = {key: read.positive_int(keys, key) for key in _NEXT_DEFAULTS if "linear_" in key}
    shape: dict[str, Any] = {
        **read.shape_of(keys, rope_theta=1e4, rms_norm_eps=1e-6, partial_rotary=True),
        **read.layer_types({"layer_types": types, **keys}),
        **linear,
    }
    return ModelConfig(
        **shape,
        shared_expert_intermediate_size=read.positive_int(keys, "shared_expert_intermediate_size"),
        shared_expert_gate=True,
        norm_topk_prob=read.flag(keys, "norm_topk_prob", True),
        attention_bias=read.flag(keys, "attention_bias"),
        qk_norm="head",
        attn_output_gate=True,
        fp32_norms=True,
        num_nextn_predict_layers=read.whole_number(keys, "num_nextn_predict_layers"),
    )


def _read_qwen3_5(raw: dict[str, Any]) -> ModelConfig:
    # The router's weights always sum to one.
    return _read_next({**raw, "norm_topk_prob": True}, num_experts=256, num_experts_per_tok=8)


def next_in_proj(config: ModelConfig, own: str) -> Tensors:
    """Yield the input projections of Qwen3-Next's DeltaNet.

    Each key head is followed by its values and gates, or by its rates and decays.
    """
    keys, values, key, value = config.delta_net_shape
    each = values // keys
    for name, stored, widths in (
        ("in_proj", "in_proj_qkvz", (key, key, each * value, each * value)),
        ("ba_proj", "in_proj_ba", (each, each)),
    ):
        total = sum(widths)
        start = 0
        slices = list[Slice]()
        for width in widths:
            for first in range(start, keys * total, total):
                shape = (keys * total, config.hidden_size)
                slices.append(Slice(f"{own}{stored}.weight", shape, range(first, first + width)))
            start += width
        yield f"{own}{name}.weight", tuple(slices)


def _qwen3_5_in_proj(config: ModelConfig, own: str) -> Tensors:
    keys, values, key, value = config.delta_net_shape
    rows = {"qkv": 2 * keys * key + values * value, "z": values * value, "b": values, "a": values}
    for name, parts in (("in_proj", ("qkv", "z")), ("ba_proj", ("b", "a"))):
        slices = (Slice(f"{own}in_proj_{x}.weight", (rows[x], config.hidden_size)) for x in parts)
        yield f"{own}{name}.weight", tuple(slices)


_SHARED = with_shared_expert(MLP_EXPERTS, "mlp.shared_expert")
QWEN2_MOE = Family("qwen2_moe", _read_qwen2, _SHARED)
QWEN3_MOE = Family("qwen3_moe", _read_qwen3, MLP_EXPERTS)
QWEN3_NEXT = Family(
    "qwen3_next",
    _read_next,
    _SHARED,
    {"attention": attention(norm_offset=1.0), "linear_attention": delta_net(next_in_proj)},
    norm_offset=1.0,
)
QWEN3_5_MOE = replace(
    QWEN3_NEXT,
    model_type="qwen3_5_moe",
    read_config=_read_qwen3_5,
    mixers={**QWEN3_NEXT.mixers, "linear_attention": delta_net(_qwen3_5_in_proj)},
)
