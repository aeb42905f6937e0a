"""Qwen3.5-MoE, by Alibaba: Qwen3.6-35B-A3B, Qwen3.5-122B-A10B, the text part alone.

It differs from Qwen3-Next in its tensors' names. The vision part and the layers for predicting
several tokens (mtp) are left out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mixchat.base.model_config import ModelConfig
from mixchat.weights.families.family import Slice, Tensors, delta_net
from mixchat.weights.families.qwen3_next import QWEN3_NEXT, read_hybrid


def _read_config(raw: dict[str, Any]) -> ModelConfig:
    # The router's weights always sum to one.
    return read_hybrid({**raw, "norm_topk_prob": True}, num_experts=256, num_experts_per_tok=8)


def _in_proj(config: ModelConfig, own: str) -> Tensors:
    keys, values, key, value = config.delta_net_shape
    rows = {"qkv": 2 * keys * key + values * value, "z": values * value, "b": values, "a": values}
    for name, parts in (("in_proj", ("qkv", "z")), ("ba_proj", ("b", "a"))):
        slices = (
            Slice(f"{own}in_proj_{part}.weight", (rows[part], config.hidden_size)) for part in parts
        )
        yield f"{own}{name}.weight", tuple(slices)


QWEN3_5_MOE = replace(
    QWEN3_NEXT,
    model_type="qwen3_5_moe",
    read_config=_read_config,
    mixers={**QWEN3_NEXT.mixers, "linear_attention": delta_net(_in_proj)},
)
