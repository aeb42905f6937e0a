"""Granite-MoE-Hybrid, by IBM: Granite 4.0 H-Tiny, 7B-A1B, and H-Small, 32B-A9B.

Most layers are Mamba2. The others attend, usually without a rotary embedding. Each layer has a
dense part beside its experts. All else is Granite-MoE's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mixchat.base.errors import CheckpointError
from mixchat.base.model_config import ModelConfig
from mixchat.weights.families import config_keys as read
from mixchat.weights.families.family import Family, Slice, Tensors, attention
from mixchat.weights.families.granitemoe import GRANITEMOE

# The names of layer types, as files are published and as transformers 5 saves them.
_LAYER_TYPES = {"linear_attention": "mamba", "attention": "full_attention"}
_NO_LIMITS = [0.0, float("inf")], [0.0, {"__float__": "Infinity"}]  # as Python and others have it
_DEFAULTS = {
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
    keys = read.with_defaults(raw, **_DEFAULTS)
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
    config = GRANITEMOE.read_config(raw)
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


def _with_shared_mlp(config: ModelConfig, prefix: str) -> Tensors:
    yield from GRANITEMOE.moe(config, prefix)
    inner, hidden, own = config.shared_expert_intermediate_size, config.hidden_size, "shared_mlp."
    gate_up = Slice(f"{prefix}{own}input_linear.weight", (2 * inner, hidden))
    name, factor = f"{prefix}{own}output_linear.weight", config.residual_multiplier
    yield f"{prefix}mlp.w13.weight", (gate_up,)
    yield f"{prefix}mlp.w2.weight", (Slice(name, (hidden, inner), factor=factor),)


def mamba(config: ModelConfig, layer: int) -> Tensors:
    """Describe Mamba2, whose input projection is stored as z above x, B, C and dt."""
    own, hidden = f"model.layers.{layer}.mamba.", config.hidden_size
    groups, heads, state, width = config.mamba_shape
    values, keys = heads * width, groups * state
    stored = f"{own}in_proj.weight", (2 * values + 2 * keys + heads, hidden)
    # Of x, B and C, in the order of an installed model.
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
    for name in ("dt_bias", "A_log", "D"):
        yield f"{own}{name}", (Slice(f"{own}{name}", (heads,)),)
    yield f"{own}norm.weight", (Slice(f"{own}norm.weight", (values,)),)
    name, factor = f"{own}out_proj.weight", config.residual_multiplier
    yield name, (Slice(name, (hidden, values), factor=factor),)


GRANITEMOEHYBRID = Family(
    "granitemoehybrid",
    _read_config,
    _with_shared_mlp,
    {"attention": attention(), "mamba": mamba},
)
