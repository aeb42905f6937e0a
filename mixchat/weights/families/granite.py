"""IBM's families: Granite-MoE (Granite 3.0 and 3.1) and Granite-MoE-Hybrid (4.0 H-Tiny, H-Small).

The experts are stacked, gate above up. The multipliers become factors of the weights. Most layers
of a hybrid are Mamba2. The others attend, usually without a rotary embedding. Each layer of a
hybrid has a dense part beside its experts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mixchat.base.errors import CheckpointError
from mixchat.base.model_config import ModelConfig
from mixchat.weights.families import config_keys as read
from mixchat.weights.families.family import (
    Family,
    Slice,
    Tensors,
    attention,
    expert_prefix,
    router,
    whole_tensors,
)

_MULTIPLIERS = (
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
    "logits_scaling",
)
# The names of layer types in published files, and as transformers 5 saves them.
_LAYER_TYPES = {"linear_attention": "mamba", "attention": "full_attention"}
_NO_LIMITS = [0.0, float("inf")], [0.0, {"__float__": "Infinity"}]  # infinity in two spellings
_HYBRID_DEFAULTS = {
    "shared_intermediate_size": 1024,
    "mamba_n_heads": 128,
    "mamba_d_head": "auto",
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "position_embedding_type": "nope",
}


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


def _read_hybrid(raw: dict[str, Any]) -> ModelConfig:
    keys = read.with_defaults(raw, **_HYBRID_DEFAULTS)
    if read.flag(keys, "mamba_proj_bias"):
        raise CheckpointError("config.json: mamba_proj_bias is not supported")
    if keys.get("time_step_limit", _NO_LIMITS[0]) not in _NO_LIMITS:
        raise CheckpointError("config.json: a time_step_limit is not supported")
    types = keys.get("layer_types", ["mamba"] * read.layer_count(keys))
    if isinstance(types, list):
        types = [_LAYER_TYPES.get(str(name), name) for name in types]
    if keys["mamba_d_head"] == "auto":
        inner = read.positive_int(keys, "mamba_expand") * read.positive_int(keys, "hidden_size")
        keys["mamba_d_head"] = inner // read.positive_int(keys, "mamba_n_heads")
    config = _read_config(raw)
    rope = config.rope_parameters
    if keys["position_embedding_type"] != "rope":
        rope = replace(rope, rope_type="nope")
    names = ("mamba_n_heads", "mamba_d_head", "mamba_n_groups", "mamba_d_state", "mamba_d_conv")
    numbers: dict[str, Any] = {name: read.positive_int(keys, name) for name in names}
    return replace(
        config,
        rope_parameters=rope,
        **read.layer_types({**keys, "layer_types": types}),
        **numbers,
        mamba_conv_bias=read.flag(keys, "mamba_conv_bias", True),
        shared_expert_intermediate_size=read.positive_int(keys, "shared_intermediate_size"),
    )


def _moe(config: ModelConfig, prefix: str) -> Tensors:
    yield from router(config, prefix, "block_sparse_moe.router.layer")
    stack = f"{prefix}block_sparse_moe."
    inner = config.intermediate_size
    hidden = config.hidden_size
    experts = config.num_local_experts
    parts: list[tuple[str, str, str, int, tuple[int, ...]]] = [
        (expert_prefix(prefix, expert), stack, f"[{expert}]", inner, (experts,))
        for expert in range(experts)
    ]
    if shared := config.shared_expert_intermediate_size:
        parts.append((f"{prefix}mlp.", f"{prefix}shared_mlp.", "", shared, ()))
    for installed, own, number, rows, stacked in parts:
        gate_up = Slice(f"{own}input_linear.weight{number}", (*stacked, 2 * rows, hidden))
        name = f"{own}output_linear.weight{number}"
        factor = config.residual_multiplier
        yield f"{installed}w13.weight", (gate_up,)
        # The factor multiplies the output of these parts, and the engine only adds it.
        yield f"{installed}w2.weight", (Slice(name, (*stacked, hidden, rows), factor=factor),)


def mamba(config: ModelConfig, layer: int) -> Tensors:
    """Describe Mamba2, whose input projection is stored as z above x, B, C and dt."""
    own = f"model.layers.{layer}.mamba."
    hidden = config.hidden_size
    groups, heads, state, width = config.mamba_shape
    values = heads * width
    keys = groups * state
    stored = f"{own}in_proj.weight", (2 * values + 2 * keys + heads, hidden)
    # The rows of x, B and C, in the order of an installed model.
    parts = range(values + keys, values + 2 * keys), range(values, values + keys), range(values)
    shifted = (range(rows.start + values, rows.stop + values) for rows in parts)
    yield f"{own}in_proj.weight", tuple(Slice(*stored, rows) for rows in (*shifted, range(values)))
    dt = range(2 * values + 2 * keys, 2 * values + 2 * keys + heads)
    yield f"{own}dt_proj.weight", (Slice(*stored, dt),)
    shapes: dict[str, tuple[int, ...]] = {"weight": (values + 2 * keys, 1, config.mamba_d_conv)}
    if config.mamba_conv_bias:
        shapes["bias"] = (values + 2 * keys,)
    for parameter, shape in shapes.items():
        name = f"{own}conv1d.{parameter}"
        yield name, tuple(Slice(name, shape, rows) for rows in parts)
    vectors = {"dt_bias": heads, "A_log": heads, "D": heads, "norm.weight": values}
    yield from whole_tensors(own, {name: (length,) for name, length in vectors.items()})
    name = f"{own}out_proj.weight"
    factor = config.residual_multiplier
    yield name, (Slice(name, (hidden, values), factor=factor),)


GRANITEMOE = Family("granitemoe", _read_config, _moe)
GRANITEMOEHYBRID = Family(
    "granitemoehybrid", _read_hybrid, _moe, {"attention": attention(), "mamba": mamba}
)
