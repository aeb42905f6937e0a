"""Granite-MoE, by IBM: Granite 3.0 and 3.1, 1B-A400M and 3B-A800M.

Its experts are stacked, gate above up. Its multipliers become factors of the weights.
"""

from __future__ import annotations

from typing import Any

from mixchat.base.model_config import ModelConfig
from mixchat.weights.families import config_keys as read
from mixchat.weights.families.family import Family, Slice, Tensors, expert_prefix, router

_MULTIPLIERS = (
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
    "logits_scaling",
)


def _read_config(raw: dict[str, Any]) -> ModelConfig:
    keys = read.with_defaults(raw, num_local_experts=8, num_experts_per_tok=2)
    multipliers: dict[str, Any] = {
        name: read.positive_number(keys, name, 1.0) for name in _MULTIPLIERS
    }
    return ModelConfig(
        **read.shape_of(keys, rope_theta=1e4, rms_norm_eps=1e-6),
        **multipliers,
        attention_bias=read.flag(keys, "attention_bias"),
    )


def _experts(config: ModelConfig, prefix: str) -> Tensors:
    inner, hidden, moe = config.intermediate_size, config.hidden_size, f"{prefix}block_sparse_moe."
    yield from router(config, prefix, "block_sparse_moe.router.layer")
    for expert in range(config.num_local_experts):
        gate_up = Slice(f"{moe}input_linear.weight[{expert}]", (2 * inner, hidden))
        # So the sum of the experts comes multiplied, and the engine only adds it.
        down = Slice(
            f"{moe}output_linear.weight[{expert}]",
            (hidden, inner),
            factor=config.residual_multiplier,
        )
        yield f"{expert_prefix(prefix, expert)}w13.weight", (gate_up,)
        yield f"{expert_prefix(prefix, expert)}w2.weight", (down,)


GRANITEMOE = Family("granitemoe", _read_config, _experts)
