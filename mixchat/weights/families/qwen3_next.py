"""Qwen3-Next, by Alibaba: Qwen3-Next-80B-A3B, Qwen3-Coder-Next.

Three of four layers are gated DeltaNets. The others attend, and their output has a gate. The layers
for predicting several tokens (mtp) are left out.
"""

from __future__ import annotations

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

_DEFAULTS = {
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


def read_hybrid(raw: dict[str, Any], **defaults: Any) -> ModelConfig:
    """Read a config.json of DeltaNets and attention, with these defaults and Qwen3-Next's."""
    keys = read.of_experts(read.with_defaults(raw, **{**_DEFAULTS, **defaults}))
    read.no_dense_layers(keys)
    every = read.positive_int({"full_attention_interval": 4, **keys}, "full_attention_interval")
    layers = range(1, read.layer_count(keys) + 1)
    types = ["linear_attention" if layer % every else "full_attention" for layer in layers]
    linear = {key: read.positive_int(keys, key) for key in _DEFAULTS if key.startswith("linear_")}
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


def in_proj(config: ModelConfig, own: str) -> Tensors:
    """Each key head is followed by its values and gates, or by its rates and decays."""
    keys, values, key, value = config.delta_net_shape
    hidden, each = config.hidden_size, values // keys
    for name, stored, widths in (
        ("in_proj", "in_proj_qkvz", (key, key, each * value, each * value)),
        ("ba_proj", "in_proj_ba", (each, each)),
    ):
        total = sum(widths)
        starts = [sum(widths[:number]) for number in range(len(widths))]
        slices = (
            Slice(
                f"{own}{stored}.weight",
                (keys * total, hidden),
                range(head * total + start, head * total + start + width),
            )
            for start, width in zip(starts, widths, strict=True)
            for head in range(keys)
        )
        yield f"{own}{name}.weight", tuple(slices)


QWEN3_NEXT = Family(
    "qwen3_next",
    read_hybrid,
    with_shared_expert(MLP_EXPERTS, "mlp.shared_expert"),
    {"attention": attention(norm_offset=1.0), "linear_attention": delta_net(in_proj)},
    norm_offset=1.0,
)
