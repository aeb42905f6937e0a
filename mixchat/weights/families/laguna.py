"""Laguna, by Poolside: Laguna XS.2, Laguna XS 2.1.

Layers with a window have more heads than the others, and all their columns rotate. A number for
each head gates the output of attention.
"""

from __future__ import annotations

from typing import Any

from mixchat.base.errors import CheckpointError
from mixchat.base.model_config import ModelConfig
from mixchat.weights.families import config_keys as read
from mixchat.weights.families.family import MLP_EXPERTS, Family, with_correction, with_shared_expert

_DEFAULTS = {
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "intermediate_size": 8192,
    "sliding_window": 512,
    "rope_parameters": {
        "full_attention": {"rope_theta": 5e5, "partial_rotary_factor": 0.5},
        "sliding_attention": {"rope_theta": 1e4, "partial_rotary_factor": 1.0},
    },
}


def _read_config(raw: dict[str, Any]) -> ModelConfig:
    layers = read.layer_count(raw)
    raw = read.with_defaults(raw, layer_types=["full_attention"] * layers, **_DEFAULTS)
    for key in ("moe_apply_router_weight_on_input", "attention_bias"):
        if read.flag(raw, key):
            raise CheckpointError(f"config.json: {key} is not supported")
    if raw.get("gating", True) not in (True, "per-head"):
        raise CheckpointError(
            f"config.json: gating is {raw['gating']!r:.80}: only a gate for each head runs"
        )
    keys = {**read.of_experts(raw), "intermediate_size": raw["moe_intermediate_size"]}
    cap = raw.get("moe_router_logit_softcapping") or None
    return ModelConfig(
        **read.shape_of(keys, rope_theta=1e4, rms_norm_eps=1e-6, partial_rotary=True),
        **read.layer_types(raw),
        num_attention_heads_per_layer=_heads(raw, layers),
        first_k_dense_replace=read.first_dense_layers(raw),
        dense_intermediate_size=read.positive_int(raw, "intermediate_size"),
        shared_expert_intermediate_size=read.positive_int(raw, "shared_expert_intermediate_size"),
        qk_norm="head",
        attn_head_gate=True,
        scoring_func="sigmoid",
        e_score_correction_bias=True,
        router_logit_softcapping=cap and read.positive_number(raw, "moe_router_logit_softcapping"),
        routed_scaling_factor=read.positive_number(raw, "moe_routed_scaling_factor", 1.0),
    )


def _heads(raw: dict[str, Any], layers: int) -> tuple[int, ...]:
    """Return the heads of each layer's queries, empty if all layers have as many."""
    heads = raw.get("num_attention_heads_per_layer")
    if heads is None:
        return ()
    if not isinstance(heads, list) or len(heads) != layers:
        raise CheckpointError(
            f"config.json: num_attention_heads_per_layer is {heads!r:.80}, not {layers} numbers"
        )
    return tuple(read.positive_int({"heads": count}, "heads") for count in heads)


_EXPERTS = with_correction(MLP_EXPERTS, "mlp.experts.e_score_correction_bias")
LAGUNA = Family(
    "laguna",
    _read_config,
    with_shared_expert(_EXPERTS, "mlp.shared_expert"),
)
