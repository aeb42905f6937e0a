"""Reads the keys of a config.json. All functions raise `CheckpointError` for a wrong value."""

from __future__ import annotations

from typing import Any, get_args

from mixchat.base.errors import CheckpointError
from mixchat.base.model_config import LayerType, RopeParameters

_SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_local_experts",
    "num_experts_per_tok",
    "max_position_embeddings",
)


def shape_of(raw: dict[str, Any], *, rope_theta: float, rms_norm_eps: float) -> dict[str, Any]:
    """Return `ModelConfig`'s arguments that all families have, with the family's defaults.

    `raw` has Mixtral's keys. The numbers of key-value heads and of a head's columns may be missing.
    """
    if raw.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"config.json: hidden_act {raw['hidden_act']!r} is not supported")
    heads = positive_int(raw, "num_attention_heads")
    values = {key: value for key, value in raw.items() if value is not None}
    values.setdefault("num_key_value_heads", heads)
    values.setdefault("head_dim", positive_int(raw, "hidden_size") // heads)
    return {
        **{key: positive_int(values, key) for key in _SHAPE},
        "model_type": raw["model_type"],
        "rms_norm_eps": positive_number(values, "rms_norm_eps", rms_norm_eps),
        "rope_parameters": rope_parameters(raw, rope_theta),
        "tie_word_embeddings": flag(raw, "tie_word_embeddings"),
        "eos_token_ids": _eos_token_ids(raw),
    }


def with_defaults(raw: dict[str, Any], **defaults: Any) -> dict[str, Any]:
    """Return the keys that are not null, with the family's defaults for others."""
    return defaults | {key: value for key, value in raw.items() if value is not None}


def of_experts(raw: dict[str, Any]) -> dict[str, Any]:
    """Return `raw` with Mixtral's keys for the count of experts and their intermediate size.

    transformers 5 writes some counts as `num_local_experts`.
    """
    keys = with_defaults(raw, num_local_experts=raw.get("num_experts"))
    return with_defaults({"intermediate_size": raw.get("moe_intermediate_size")}, **keys)


def layer_types(raw: dict[str, Any]) -> dict[str, Any]:
    """Return `ModelConfig`'s arguments for the windows of the layers in `layer_types`."""
    types = raw["layer_types"]
    known = get_args(LayerType)
    if not isinstance(types, list) or not all(kind in known for kind in types):
        raise CheckpointError(
            f"config.json: layer_types is {types!r:.80}, not a list of {' or '.join(known)}"
        )
    if "sliding_attention" not in types:
        return {}
    return {"sliding_window": positive_int(raw, "sliding_window"), "layer_types": tuple(types)}


def sliding_layers(raw: dict[str, Any]) -> dict[str, Any]:
    """Return `ModelConfig`'s arguments for a window of all layers, if config.json has one."""
    if raw.get("sliding_window") is None:
        return {}
    layers = positive_int(raw, "num_hidden_layers")
    return {
        "sliding_window": positive_int(raw, "sliding_window"),
        "layer_types": ("sliding_attention",) * layers,
    }


def rope_parameters(raw: dict[str, Any], rope_theta: float) -> RopeParameters:
    """Return the rotary embedding in `rope_parameters`, or in older files' `rope_scaling`."""
    older, newer = _object(raw, "rope_scaling"), _object(raw, "rope_parameters")
    for rope in (older, newer):
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default" or "factor" in rope:
            raise CheckpointError(
                f"config.json: rope type {kind!r} with scaling is not supported",
                hint="Models whose context was stretched (linear, dynamic, yarn, llama3) do not "
                "run yet; choose one with plain rotary embeddings.",
            )
    values = {**raw, **older, **newer}
    return RopeParameters(positive_number(values, "rope_theta", rope_theta))


def positive_int(values: dict[str, Any], key: str) -> int:
    """Return a positive whole number."""
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise CheckpointError(f"config.json: {key} is {value!r}, not a positive whole number")
    return value


def positive_number(values: dict[str, Any], key: str, default: float) -> float:
    """Return a positive number, `default` if the key is missing."""
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
        raise CheckpointError(f"config.json: {key} is {value!r}, not a positive number")
    return float(value)


def flag(values: dict[str, Any], key: str, default: bool = False) -> bool:
    """Return true or false, `default` if the key is missing."""
    value = values.get(key, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json: {key} is {value!r}, not true or false")
    return value


def _object(raw: dict[str, Any], key: str) -> dict[str, Any]:
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise CheckpointError(f"config.json: {key} is {value!r}, not an object")
    return value


def _eos_token_ids(raw: dict[str, Any]) -> tuple[int, ...]:
    given = raw.get("eos_token_id")
    tokens = given if isinstance(given, list) else [] if given is None else [given]
    for token in tokens:
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise CheckpointError(f"config.json: eos_token_id is {token!r}, not a whole number")
    return tuple(tokens)
