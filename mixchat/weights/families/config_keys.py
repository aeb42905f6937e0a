"""Reads the keys of a config.json. All functions raise `CheckpointError` for a wrong value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

from mixchat.base.errors import CheckpointError
from mixchat.base.model_config import LayerType
from mixchat.base.rope_parameters import RopeParameters, RopeType

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


_LAYERS_MAX = 10_000
_ORIGINAL = "original_max_position_embeddings"
# The parameters of each type of rope besides its factor.
_ROPE_NUMBERS: dict[RopeType, tuple[str, ...]] = {
    "default": (),
    "linear": (),
    "dynamic": (),
    "yarn": (
        *("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
        "llama_4_scaling_beta",
    ),
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "longrope": ("attention_factor",),
    "proportional": (),
}


def shape_of(
    raw: dict[str, Any], *, rope_theta: float, rms_norm_eps: float, partial_rotary: bool = False
) -> dict[str, Any]:
    """Return `ModelConfig`'s arguments that all families have, with the family's defaults.

    `raw` has Mixtral's keys. `num_key_value_heads` and `head_dim` may be missing.
    partial_rotary: the family's attention can rotate a part of each head.
    """
    ropes = rope_parameters(raw, rope_theta)
    if not partial_rotary and any(rope.partial_rotary_factor != 1 for rope in ropes.values()):
        raise CheckpointError("config.json: a partial_rotary_factor is not supported")
    if raw.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"config.json: hidden_act {raw['hidden_act']!r:.80} is not supported")
    end_ids = raw.get("eos_token_id")
    end_ids = end_ids if isinstance(end_ids, list) else [] if end_ids is None else [end_ids]
    for token_id in end_ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
            raise CheckpointError(
                f"config.json: eos_token_id is {token_id!r:.80}, not a whole number"
            )
    heads = positive_int(raw, "num_attention_heads")
    values = with_defaults(raw)
    # As in transformers: without the key every head has its own key and value.
    values.setdefault("num_key_value_heads", heads)
    values.setdefault("head_dim", positive_int(raw, "hidden_size") // heads)
    return {
        **{key: positive_int(values, key) for key in _SHAPE},
        "model_type": raw["model_type"],
        "rms_norm_eps": positive_number(values, "rms_norm_eps", rms_norm_eps),
        **ropes,
        "tie_word_embeddings": flag(raw, "tie_word_embeddings"),
        "eos_token_ids": tuple(end_ids),
    }


def with_defaults(raw: dict[str, Any], **defaults: Any) -> dict[str, Any]:
    """Return the keys that are not null, with the family's defaults for others."""
    return defaults | {key: value for key, value in raw.items() if value is not None}


def of_experts(raw: dict[str, Any], count: str = "num_experts") -> dict[str, Any]:
    """Return `raw` with Mixtral's keys for the count of experts and their intermediate size.

    `count` is the family's key. transformers 5 writes some counts as `num_local_experts`.
    """
    keys = with_defaults(raw, num_local_experts=raw.get(count))
    return with_defaults({"intermediate_size": raw.get("moe_intermediate_size")}, **keys)


def corrected_router(raw: dict[str, Any]) -> dict[str, Any]:
    """Return `ModelConfig`'s arguments for a router like DeepSeek-V3's."""
    scale = positive_number(with_defaults(raw), "routed_scaling_factor", 1.0)
    return {
        "scoring_func": "sigmoid",
        "e_score_correction_bias": True,
        "routed_scaling_factor": scale,
        **groups_of_experts(raw),
    }


def groups_of_experts(raw: dict[str, Any]) -> dict[str, Any]:
    """Return `ModelConfig`'s arguments for a router that chooses groups of experts first."""
    values = with_defaults(raw)
    return {key: positive_int({key: 1, **values}, key) for key in ("n_group", "topk_group")}


def latent_model(raw: dict[str, Any], *, rms_norm_eps: float) -> dict[str, Any]:
    """Return `ModelConfig`'s arguments for a model of DeepSeek's form.

    It has multi-head latent attention, shared experts and dense layers at the beginning.
    """
    heads = raw.get("num_attention_heads")
    rotating = raw.get("qk_rope_head_dim")
    keys = of_experts(
        {**raw, "num_key_value_heads": heads, "head_dim": rotating}, "n_routed_experts"
    )
    bias = flag(raw, "attention_bias")
    rank = whole_number(raw, "q_lora_rank")
    if bias and not rank:
        raise CheckpointError("config.json: attention_bias needs a q_lora_rank")
    if not flag(with_defaults(raw), "rope_interleave", True):
        raise CheckpointError("config.json: rope_interleave is false: such heads do not run")
    sizes = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    return {
        **shape_of(keys, rope_theta=1e4, rms_norm_eps=rms_norm_eps),
        **dense_parts(raw),
        **{key: positive_int(raw, key) for key in sizes},
        "q_lora_rank": rank,
        "attention_bias": bias,
    }


def dense_parts(
    raw: dict[str, Any], shared: str = "n_shared_experts", first: str = "first_k_dense_replace"
) -> dict[str, Any]:
    """Return `ModelConfig`'s arguments for shared experts, and for dense layers at the beginning.

    `shared` and `first` name the keys that count them.
    """
    inner = positive_int(raw, "moe_intermediate_size")
    return {
        "shared_expert_intermediate_size": inner * whole_number(raw, shared),
        "first_k_dense_replace": whole_number(raw, first),
        "dense_intermediate_size": positive_int(raw, "intermediate_size"),
    }


def first_dense_layers(raw: dict[str, Any], default: int = 1) -> int:
    """Return the count of layers without experts, which have to be the first ones."""
    types = raw.get("mlp_layer_types")
    if types is None:
        return default
    dense = types.count("dense") if isinstance(types, list) else 0
    if types != ["dense"] * dense + ["sparse"] * (layer_count(raw) - dense):
        raise CheckpointError(
            f"config.json: mlp_layer_types is {types!r:.80}: dense layers after layers with "
            "experts do not run"
        )
    return dense


def refuse_dense_layers(raw: dict[str, Any]) -> None:
    """Refuse layers without experts."""
    for key, usual in (("decoder_sparse_step", 1), ("mlp_only_layers", [])):
        if raw.get(key, usual) != usual:
            raise CheckpointError(
                f"config.json: {key} is {raw[key]!r:.80}: models with dense layers do not run"
            )


def layer_types(raw: dict[str, Any]) -> dict[str, Any]:
    """Return `ModelConfig`'s arguments for the mixers and windows of `layer_types`."""
    types = raw.get("layer_types")
    known = get_args(LayerType)
    if not isinstance(types, list) or not all(name in known for name in types):
        raise CheckpointError(
            f"config.json: layer_types is {types!r:.80}, not a list of {' or '.join(known)}"
        )
    if {*types} <= {"full_attention"}:
        return {}
    window = positive_int(raw, "sliding_window") if "sliding_attention" in types else None
    return {"sliding_window": window, "layer_types": tuple(types)}


def types_of_layers(raw: dict[str, Any], is_sliding: Callable[[int], bool]) -> list[str]:
    """Return `layer_types`, with a window in each layer for which `is_sliding` is true."""
    layers = range(layer_count(raw))
    return ["sliding_attention" if is_sliding(layer) else "full_attention" for layer in layers]


def layer_count(raw: dict[str, Any]) -> int:
    """Return the count of layers, at most 10,000."""
    # Callers make lists of this length, which nothing else bounds yet.
    layers = positive_int(raw, "num_hidden_layers")
    if layers > _LAYERS_MAX:
        raise CheckpointError(f"config.json: {layers} layers are more than any model has")
    return layers


def sliding_layers(raw: dict[str, Any]) -> dict[str, Any]:
    """Return `ModelConfig`'s arguments for a window of all layers, if config.json has one."""
    if raw.get("sliding_window") is None:
        return {}
    return {
        "sliding_window": positive_int(raw, "sliding_window"),
        "layer_types": ("sliding_attention",) * layer_count(raw),
    }


def rope_parameters(raw: dict[str, Any], rope_theta: float) -> dict[str, RopeParameters]:
    """Return `ModelConfig`'s arguments for the rotary embedding, as transformers reads them.

    They are in the older `rope_scaling`, or else in `rope_parameters`, which may hold an object for
    each type of layers. Some values may be in `raw` itself.
    """
    rope = _object(raw, "rope_scaling") or _object(raw, "rope_parameters")
    outer = {key: raw.get(key) for key in ("rope_theta", "partial_rotary_factor")}
    outer = {"rope_theta": rope_theta, **with_defaults(outer)}
    context = positive_int(raw, "max_position_embeddings")
    keyed = [name for name in ("full_attention", "sliding_attention") if name in rope]
    if not keyed:
        # Phi-3 has this key outside of the rope. There it takes precedence in transformers.
        original = with_defaults({_ORIGINAL: raw.get(_ORIGINAL)})
        return {"rope_parameters": _rope({**outer, **with_defaults(rope), **original}, context)}
    # transformers looks for `truncate` outside these objects, and never in them.
    truncate = {"truncate": rope.get("truncate", True)}
    objects = (with_defaults(_object(rope, layer_type)) for layer_type in keyed)
    ropes = [_rope({**outer, **values, **truncate}, context) for values in objects]
    return dict(zip(("rope_parameters", "sliding_rope_parameters"), ropes, strict=False))


def _rope(values: dict[str, Any], context: int) -> RopeParameters:
    """Return the rotary embedding in `values`. `context` is `max_position_embeddings`."""
    rope_type = values.get("rope_type", values.get("type", "default"))
    if not isinstance(rope_type, str) or rope_type not in _ROPE_NUMBERS:
        raise CheckpointError(
            f"config.json: rope type {rope_type!r:.80} is not supported",
            hint=f"The types that run are {', '.join(_ROPE_NUMBERS)}.",
        )
    theta = positive_number(values, "rope_theta")
    partial = positive_number(values, "partial_rotary_factor", 1.0)
    if rope_type == "default":
        if "factor" in values:
            raise CheckpointError("config.json: the rope has a factor, but no rope_type")
        return RopeParameters(theta, partial_rotary_factor=partial)
    trained = values if rope_type in ("yarn", "llama3", "longrope") else {}
    original = positive_int({_ORIGINAL: context, **trained}, _ORIGINAL)
    # For these two types, transformers computes a missing factor from the contexts.
    implied = context / original if rope_type in ("yarn", "longrope") else None
    if rope_type == "proportional":
        implied = 1.0
    keys = [key for key in _ROPE_NUMBERS[rope_type] if key in values or rope_type == "llama3"]
    read: dict[str, Any] = {key: positive_number(values, key) for key in keys}
    if rope_type == "longrope":
        read |= {key: _numbers(values, key) for key in ("short_factor", "long_factor")}
    return RopeParameters(
        theta,
        rope_type,
        factor=positive_number(values, "factor", implied),
        original_max_position_embeddings=original,
        truncate=rope_type != "yarn" or flag(values, "truncate", True),
        partial_rotary_factor=partial,
        **read,
    )


def _numbers(values: dict[str, Any], key: str) -> tuple[float, ...]:
    numbers = values.get(key)
    if not isinstance(numbers, list):
        raise CheckpointError(f"config.json: {key} is {numbers!r:.80}, not a list of numbers")
    return tuple(positive_number({key: number}, key) for number in numbers)


def positive_int(values: dict[str, Any], key: str) -> int:
    """Return a positive whole number."""
    value = values.get(key)
    # JSON's true is an int in Python. The product of two numbers below 2**31 fits in int64.
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise CheckpointError(f"config.json: {key} is {value!r:.80}, not a positive whole number")
    return value


def whole_number(values: dict[str, Any], key: str) -> int:
    """Return a whole number, 0 if the key is missing or null."""
    number = values.get(key)
    return 0 if number is None or number == 0 else positive_int(values, key)


def positive_number(values: dict[str, Any], key: str, default: float | None = None) -> float:
    """Return a positive number, `default` if the key is missing."""
    value = values.get(key, default)
    # Python's JSON also reads NaN and Infinity. NaN fails every comparison.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
        raise CheckpointError(f"config.json: {key} is {value!r:.80}, not a positive number")
    return float(value)


def flag(values: dict[str, Any], key: str, default: bool = False) -> bool:
    """Return true or false, `default` if the key is missing."""
    value = values.get(key, default)
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json: {key} is {value!r:.80}, not true or false")
    return value


def _object(raw: dict[str, Any], key: str) -> dict[str, Any]:
    value = raw.get(key) or {}
    if not isinstance(value, dict):
        raise CheckpointError(f"config.json: {key} is {value!r:.80}, not an object")
    return value
