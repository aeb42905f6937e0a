"""Gemma 4, by Google: 26B-A4B. Only the language model is read.

A layer has a dense part and experts. The output of each part of a layer is normalized. Full layers
have wider heads than layers with a window, and take their keys as values.
"""

from __future__ import annotations

import math
from typing import Any

from mixchat.base.errors import CheckpointError
from mixchat.base.model_config import ModelConfig
from mixchat.weights.families import config_keys as read
from mixchat.weights.families.family import (
    Family,
    Slice,
    Tensors,
    norm,
    separate_experts,
    with_shared_expert,
)

# For a config.json without a rope, from transformers' config class.
_ROPES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {
        "rope_type": "proportional",
        "rope_theta": 1e6,
        "partial_rotary_factor": 0.25,
    },
}
_CAP = "final_logit_softcapping"
_DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 512,
    "rope_parameters": _ROPES,
    "tie_word_embeddings": True,
    "hidden_size_per_layer_input": 256,
    "eos_token_id": 1,
}


def _read_config(raw: dict[str, Any]) -> ModelConfig:
    raw = read.with_defaults(raw, **_DEFAULTS)
    _refuse(raw)
    types = read.types_of_layers(raw, lambda layer: (layer + 1) % 6 != 0)
    types = [*types[:-1], "full_attention"]
    keys = read.of_experts(read.with_defaults(raw, layer_types=types))
    keys = {**keys, "num_experts_per_tok": raw.get("top_k_experts")}
    # `intermediate_size` is the dense part's.
    keys["intermediate_size"] = raw.get("moe_intermediate_size")
    shares = read.flag(raw, "attention_k_eq_v")
    cap = raw.get(_CAP)
    return ModelConfig(
        **read.shape_of(keys, rope_theta=1e4, rms_norm_eps=1e-6, partial_rotary=True),
        **read.layer_types(keys),
        **_full_layers(raw, shares=shares),
        attention_k_eq_v=shares,
        v_norm=True,
        qk_norm="head",
        fp32_norms=True,
        attention_bias=read.flag(raw, "attention_bias"),
        attention_multiplier=1.0,
        embedding_multiplier=_embedding_multiplier(raw),
        shared_expert_intermediate_size=read.positive_int(raw, "intermediate_size"),
        hidden_act="gelu_pytorch_tanh",
        sandwich_norms=True,
        per_expert_scale=True,
        final_logit_softcapping=None if cap is None else read.positive_number(raw, _CAP),
    )


def _refuse(raw: dict[str, Any]) -> None:
    """Refuse the features of other models of Gemma 4."""
    if not read.flag(raw, "enable_moe_block"):
        raise CheckpointError("config.json: enable_moe_block is not true: dense models do not run")
    usual = {
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "hidden_activation": "gelu_pytorch_tanh",
    }
    for key, value in usual.items():
        if raw.get(key, value) != value:
            raise CheckpointError(f"config.json: {key} is {raw[key]!r:.80}, which does not run")
    if raw.get("use_bidirectional_attention") == "all":
        raise CheckpointError("config.json: models that attend to later tokens do not run")


def _full_layers(raw: dict[str, Any], *, shares: bool) -> dict[str, Any]:
    """Return the shape of full layers' heads.

    Newer versions of transformers write it in `per_layer_config`, by the numbers of layers.
    """
    names = {"head_dim": "global_head_dim", "num_key_value_heads": "num_global_key_value_heads"}
    by_layer = raw.get("per_layer_config")
    if by_layer is None:
        values = {"global_head_dim": raw.get("global_head_dim", 512)}
        if shares:
            values["num_global_key_value_heads"] = raw.get("num_global_key_value_heads")
    else:
        shapes: list[Any] = [*by_layer.values()] if isinstance(by_layer, dict) else [None]
        if any(each != shapes[0] or not isinstance(each, dict) for each in shapes):
            raise CheckpointError(
                f"config.json: per_layer_config is {by_layer!r:.80}, not of one shape"
            )
        values = {names[key]: shapes[0].get(key) for key in names if shapes}
    present = read.with_defaults(values)
    return {key: read.positive_int(present, key) for key in present}


def _embedding_multiplier(raw: dict[str, Any]) -> float:
    """Return the root of the hidden size, rounded to the type of the weights as in transformers."""
    root = math.sqrt(read.positive_int(raw, "hidden_size"))
    if raw.get("dtype", raw.get("torch_dtype")) != "bfloat16":
        return root
    fraction, exponent = math.frexp(root)
    return math.ldexp(round(fraction * 256), exponent - 8)


_EXPERTS = with_shared_expert(separate_experts("moe", "gate_proj", "down_proj", "up_proj"), "mlp")


def _moe(config: ModelConfig, prefix: str) -> Tensors:
    hidden = config.hidden_size
    moe = f"{prefix}block_sparse_moe."
    norms = {
        f"{prefix}mixer_out_norm": "mixer_out_norm",
        f"{prefix}mlp.out_norm": "post_feedforward_layernorm_1",
        f"{moe}norm": "pre_feedforward_layernorm_2",
        f"{moe}out_norm": "post_feedforward_layernorm_2",
        f"{prefix}out_norm": "post_feedforward_layernorm",
    }
    for installed, name in norms.items():
        (_, slices) = norm(f"{prefix}{name}.weight", hidden)
        yield f"{installed}.weight", slices
    scale = Slice(f"{prefix}router.scale", (hidden,), factor=hidden**-0.5)
    yield f"{moe}router_norm.weight", (scale,)
    yield f"{prefix}layer_scalar", (Slice(f"{prefix}layer_scalar", (1,)),)
    scales = Slice(f"{prefix}router.per_expert_scale", (config.num_local_experts,))
    yield f"{moe}gate.per_expert_scale", (scales,)
    yield from _EXPERTS(config, prefix)


GEMMA4 = Family(
    "gemma4",
    _read_config,
    _moe,
    names={
        # In an installed model the norm before the dense part has this name.
        "post_attention_layernorm": "pre_feedforward_layernorm",
        "mixer_out_norm": "post_attention_layernorm",
        "moe.gate": "router.proj",
        "moe.experts": "experts",
    },
)
