"""gpt-oss, by OpenAI: 20b and 120b.

Its experts are stacked. The rows of gate and up alternate. In 16 bits they are stored [in, out].
"""

from __future__ import annotations

from typing import Any

from mixchat.base.model_config import ModelConfig
from mixchat.weights.families import config_keys as read
from mixchat.weights.families.family import Family, Slice, Tensors, expert_prefix, router

# For a config.json without a rope, from transformers' config class.
_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _read_config(raw: dict[str, Any]) -> ModelConfig:
    types = read.types_of_layers(raw, lambda layer: layer % 2 == 0)
    rope = {} if raw.get("rope_scaling") else {"rope_parameters": _ROPE}
    keys = read.with_defaults(
        raw, num_key_value_heads=8, head_dim=64, sliding_window=128, layer_types=types, **rope
    )
    return ModelConfig(
        **read.shape_of(keys, rope_theta=1.5e5, rms_norm_eps=1e-5),
        **read.layer_types(keys),
        attention_bias=read.flag(keys, "attention_bias", True),
        attention_sinks=True,
        moe_bias=True,
        swiglu_limit=read.positive_number(keys, "swiglu_limit", 7.0),
        swiglu_alpha=read.positive_number(keys, "swiglu_alpha", 1.702),
    )


def _experts(config: ModelConfig, prefix: str) -> Tensors:
    inner = config.intermediate_size
    hidden = config.hidden_size
    stack = f"{prefix}mlp.experts."
    experts = config.num_local_experts
    # Row 0 is the gate of channel 0, row 1 its up. w13 has all gates above all ups.
    gate_up = range(0, 2 * inner, 2), range(1, 2 * inner, 2)
    yield from router(config, prefix, "mlp.router")
    for expert in range(experts):
        installed = expert_prefix(prefix, expert)
        up = f"{stack}gate_up_proj[{expert}]"
        down = f"{stack}down_proj[{expert}]"
        up_bias = f"{stack}gate_up_proj_bias[{expert}]"
        yield (
            f"{installed}w13.weight",
            tuple(Slice(up, (experts, hidden, 2 * inner), x, transposed=True) for x in gate_up),
        )
        up_biases = (Slice(up_bias, (experts, 2 * inner), rows) for rows in gate_up)
        yield f"{installed}w13.bias", tuple(up_biases)
        yield f"{installed}w2.weight", (Slice(down, (experts, inner, hidden), transposed=True),)
        down_bias = Slice(f"{stack}down_proj_bias[{expert}]", (experts, hidden))
        yield f"{installed}w2.bias", (down_bias,)


GPT_OSS = Family("gpt_oss", _read_config, _experts)
