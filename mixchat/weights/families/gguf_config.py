"""The metadata of a model in GGUF as a config.json.

llama.cpp calls a family an architecture. Its code fixes values that a config.json has as keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from operator import floordiv, sub
from typing import Any

from mixchat.base.errors import CheckpointError
from mixchat.weights.families.gguf import EMBEDDING, HEAD

_KEYS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "moe_intermediate_size": "expert_feed_forward_length",
    "max_position_embeddings": "context_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "num_experts_per_tok": "expert_used_count",
    "num_experts": "expert_count",
}
_ROPE = "rope.scaling."
# The values that llama.cpp takes for missing keys.
_UNSAID: Mapping[str, Any] = {
    "expert_weights_norm": False,
    "expert_weights_scale": 1.0,
    "leading_dense_block_count": 0,
    # In Granite this key says that heads rotate.
    "rope.scaling.finetuned": True,
}
_SOFTMAX_GATING, _SIGMOID_GATING = (1, 3), 2  # a softmax before or after the choice of experts
_LATER_DENSE = {
    "n_shared_experts": "expert_shared_count",
    "first_k_dense_replace": "leading_dense_block_count",
    "routed_scaling_factor": "expert_weights_scale",
    "norm_topk_prob": "expert_weights_norm",
    "n_group": "expert_group_count",
    "topk_group": "expert_group_used_count",
}


@dataclass(frozen=True)
class _Architecture:
    """A family by llama.cpp's name for it."""

    model_type: str
    keys: Mapping[str, str] = field(default_factory=dict)  # keys of config.json, beside `_KEYS`
    fixed: Mapping[str, Any] = field(default_factory=dict)  # set in llama.cpp's code
    experts: str = "num_experts"  # config.json's key for their count
    sigmoid: bool = False  # the router takes a sigmoid, not a softmax
    # The keys of config.json whose numbers follow from two of llama.cpp's.
    derived: Mapping[str, tuple[str, Callable[[int, int], int], str]] = field(default_factory=dict)
    stateful: str = "conv"  # the type of layers without keys


_DELTA_NET = {
    "linear_conv_kernel_dim": "ssm.conv_kernel",
    "linear_key_head_dim": "ssm.state_size",
    "linear_num_key_heads": "ssm.group_count",
    "linear_num_value_heads": "ssm.time_step_rank",
    "full_attention_interval": "full_attention_interval",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "num_nextn_predict_layers": "nextn_predict_layers",
}
_VALUES = {"linear_value_head_dim": ("ssm.inner_size", floordiv, "ssm.time_step_rank")}
_LATENTS = {
    **_LATER_DENSE,
    "q_lora_rank": "attention.q_lora_rank",
    "kv_lora_rank": "attention.kv_lora_rank",
    "qk_rope_head_dim": "rope.dimension_count",
    "v_head_dim": "attention.value_length_mla",
    "num_nextn_predict_layers": "nextn_predict_layers",
}
_MULTIPLIERS = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
_UNROTATED = {"qk_nope_head_dim": ("attention.key_length_mla", sub, "rope.dimension_count")}


_ARCHITECTURES = {
    "llama": _Architecture("mixtral", experts="num_local_experts"),
    "qwen3moe": _Architecture("qwen3_moe", fixed={"norm_topk_prob": True}),
    "qwen2moe": _Architecture(
        "qwen2_moe",
        {"shared_expert_intermediate_size": "expert_shared_feed_forward_length"},
        {"norm_topk_prob": False},
    ),
    "olmoe": _Architecture("olmoe", fixed={"norm_topk_prob": False}),
    "granitemoe": _Architecture("granitemoe", _MULTIPLIERS, experts="num_local_experts"),
    "granitehybrid": _Architecture(
        "granitemoehybrid",
        {
            **_MULTIPLIERS,
            "shared_intermediate_size": "expert_shared_feed_forward_length",
            "mamba_n_heads": "ssm.time_step_rank",
            "mamba_n_groups": "ssm.group_count",
            "mamba_d_state": "ssm.state_size",
            "mamba_d_conv": "ssm.conv_kernel",
            "position_embedding_type": "rope.scaling.finetuned",
        },
        experts="num_local_experts",
        derived={"mamba_d_head": ("ssm.inner_size", floordiv, "ssm.time_step_rank")},
        stateful="mamba",
    ),
    "gpt-oss": _Architecture(
        "gpt_oss", {"sliding_window": "attention.sliding_window"}, experts="num_local_experts"
    ),
    "ernie4_5-moe": _Architecture(
        "ernie4_5_moe",
        {
            "moe_k": "expert_used_count",
            "moe_num_shared_experts": "expert_shared_count",
            "moe_layer_start_index": "leading_dense_block_count",
            "moe_layer_interval": "interleave_moe_layer_step",
        },
        experts="moe_num_experts",
    ),
    "dots1": _Architecture("dots1", _LATER_DENSE, experts="n_routed_experts", sigmoid=True),
    "minimax-m2": _Architecture("minimax_m2", experts="num_local_experts", sigmoid=True),
    "qwen3next": _Architecture(
        "qwen3_next", _DELTA_NET, derived=_VALUES, stateful="linear_attention"
    ),
    "qwen35moe": _Architecture(
        "qwen3_5_moe", _DELTA_NET, derived=_VALUES, stateful="linear_attention"
    ),
    "deepseek2": _Architecture(
        "deepseek_v3", _LATENTS, experts="n_routed_experts", sigmoid=True, derived=_UNROTATED
    ),
    "mistral4": _Architecture("mistral4", _LATENTS, experts="n_routed_experts", derived=_UNROTATED),
    "lfm2moe": _Architecture(
        "lfm2_moe",
        {
            "conv_L_cache": "shortconv.l_cache",
            "num_dense_layers": "leading_dense_block_count",
            "norm_eps": "attention.layer_norm_rms_epsilon",
        },
        sigmoid=True,
    ),
    "gemma4": _Architecture(
        "gemma4",
        {
            "top_k_experts": "expert_used_count",
            "head_dim": "attention.key_length_swa",
            "global_head_dim": "attention.key_length",
            "sliding_window": "attention.sliding_window",
            "hidden_size_per_layer_input": "embedding_length_per_layer_input",
            "num_kv_shared_layers": "attention.shared_kv_layers",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        {"enable_moe_block": True},
    ),
    "glm4moe": _Architecture(
        "glm4_moe",
        {**_LATER_DENSE, "num_nextn_predict_layers": "nextn_predict_layers"},
        experts="n_routed_experts",
        sigmoid=True,
    ),
}


# For files whose router takes no sigmoid, though other files of the architecture do.
_SOFTMAX = {
    "deepseek2": _Architecture(
        "deepseek_v2",
        _LATENTS,
        {"topk_method": "group_limited_greedy", "norm_topk_prob": False},
        experts="n_routed_experts",
        derived=_UNROTATED,
    )
}


def gguf_config(
    metadata: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], where: str
) -> dict[str, Any]:
    """Return the config.json of the model with this metadata, and with tensors of these shapes.

    `where` names it in messages. Raises `CheckpointError`.
    """
    architecture, name = _find_architecture(metadata, tensors, where)
    keys = {**_KEYS, architecture.experts: "expert_count", **architecture.keys}

    def value(gguf_key: str) -> Any:
        # In old files the usual keys have the widths of latent attention's heads.
        usual = metadata.get(f"{name}.{gguf_key.removesuffix('_mla')}", _UNSAID.get(gguf_key))
        return metadata.get(f"{name}.{gguf_key}", usual)

    values = {key: value(gguf_key) for key, gguf_key in keys.items()}
    if values["intermediate_size"] is None:
        values["intermediate_size"] = values["moe_intermediate_size"]
    sliding = value("attention.sliding_window_pattern")
    values |= _of_layers(values["num_key_value_heads"], sliding, architecture.stateful)
    for key, (first, operation, second) in architecture.derived.items():
        left = value(first)
        right = value(second)
        if isinstance(left, int) and isinstance(right, int) and right > 0:
            values[key] = operation(left, right)
    # 0 groups of experts mean that the router does not choose groups.
    values |= {key: values[key] or None for key in ("n_group", "topk_group") if key in values}
    config = {key: value for key, value in values.items() if value is not None}
    for key, value in config.items():
        # A list has a value for each layer.
        if key != "layer_types" and not isinstance(value, (bool, int, float)):
            raise CheckpointError(
                f"{where}: {key} is {type(value).__name__}, not a number: models with layers of "
                "different shapes do not run"
            )
    if (rotates := config.get("position_embedding_type")) is not None:
        config["position_embedding_type"] = "rope" if rotates else "nope"
    for key, fixed in architecture.fixed.items():
        if config.get(key, fixed) != fixed:
            raise CheckpointError(f"{where}: {key} cannot be {config[key]} in {name}")
    # The blocks that predict further tokens are counted with the others.
    if predicting := config.get("num_nextn_predict_layers"):
        config["num_hidden_layers"] = config.get("num_hidden_layers", 0) - predicting
    return {
        "model_type": architecture.model_type,
        # This holds if the file has no such key. Older files of DeepSeek lack groups, and llama.cpp
        # runs them without groups.
        "q_lora_rank": None,
        "n_group": 1,
        "topk_group": 1,
        "num_nextn_predict_layers": 0,
        **config,
        **_rope(metadata, f"{name}.", config, architecture.model_type, where),
        **_shown_by(tensors),
        **architecture.fixed,
    }


def _find_architecture(
    metadata: Mapping[str, Any], tensors: Iterable[str], where: str
) -> tuple[_Architecture, str]:
    """Return the architecture of a model with this metadata and these tensors, and its name."""
    name = metadata.get("general.architecture")
    gating = metadata.get(f"{name}.expert_gating_func")
    # Older files of GLM-4.7-Flash have no key for the sigmoid. Their corrections show it, since in
    # these families only a sigmoid's scores have corrections.
    has_corrections = any(tensor.endswith("exp_probs_b.bias") for tensor in tensors)
    is_sigmoid = gating == _SIGMOID_GATING or has_corrections
    known = _ARCHITECTURES if is_sigmoid else {**_ARCHITECTURES, **_SOFTMAX}
    architecture = known.get(name) if isinstance(name, str) else None
    # llama.cpp calls a dense Llama and a Mixtral "llama". Only the experts distinguish them.
    if architecture is None or (name == "llama" and not metadata.get("llama.expert_count")):
        unsupported = "dense models" if architecture else f"the architecture {name!r:.80}"
        raise CheckpointError(
            f"{where}: mixchat does not run {unsupported}",
            hint=f"It runs mixtures of experts, as GGUF of {', '.join(_ARCHITECTURES)}.",
        )
    usual = (_SIGMOID_GATING,) if architecture.sigmoid else _SOFTMAX_GATING
    if gating not in (None, 0, *usual):
        raise CheckpointError(f"{where}: its router computes scores of the kind {gating!r:.80}")
    return architecture, str(name)


def _of_layers(heads: object, is_sliding: object, stateful: str) -> dict[str, Any]:
    """Return the keys that a list of key heads shows, one for each layer.

    Layers with a state have 0. Layers with a window may have another count than full layers.
    """
    if not isinstance(heads, list) or not all(type(count) is int for count in heads) or not heads:
        return {}
    if isinstance(is_sliding, list) and len(is_sliding) == len(heads):
        kinds = {bool(slides): count for slides, count in zip(is_sliding, heads, strict=True)}
        if any(kinds[bool(x)] != count for x, count in zip(is_sliding, heads, strict=True)):
            return {}
        types = ["sliding_attention" if slides else "full_attention" for slides in is_sliding]
        own = {True: "num_key_value_heads", False: "num_global_key_value_heads"}
        return {"layer_types": types, **{own[slides]: count for slides, count in kinds.items()}}
    if {*heads} - {0, max(heads)}:
        return {}
    types = ["full_attention" if count else stateful for count in heads]
    return {"num_key_value_heads": max(heads), "layer_types": types}


def _shown_by(tensors: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return the keys of config.json that are known only from the tensors."""
    bias = "blk.0.attn_q.bias" in tensors
    counts = {x: sum(name.endswith(f"attn_{x}.weight") for name in tensors) for x in "kv"}
    return {
        "vocab_size": tensors.get(EMBEDDING, (0,))[0],
        "tie_word_embeddings": HEAD not in tensors,
        "attention_bias": bias,
        "qkv_bias": bias,
        "mamba_conv_bias": any(name.endswith("ssm_conv1d.bias") for name in tensors),
        "use_qk_norm": "blk.0.attn_q_norm.weight" in tensors,
        "attention_k_eq_v": counts["v"] < counts["k"],
    }


def _rope(
    metadata: Mapping[str, Any], prefix: str, config: Mapping[str, Any], model_type: str, where: str
) -> dict[str, Any]:
    """Return the rotary embedding, with a head's width and the part of it that is rotated."""
    keys: dict[str, Any] = {}
    theta = metadata.get(f"{prefix}rope.freq_base", 1e4)
    if (sliding := metadata.get(f"{prefix}rope.freq_base_swa")) is not None:
        # This is Gemma 4. It rotates a quarter of a head, which is known only from the tensor
        # rope_freqs.
        full = {"rope_type": "proportional", "rope_theta": theta, "partial_rotary_factor": 0.25}
        own = {"rope_type": "default", "rope_theta": sliding}
        return {"rope_parameters": {"full_attention": full, "sliding_attention": own}}
    rotated = metadata.get(f"{prefix}rope.dimension_count")
    if rotated is not None and "kv_lora_rank" not in config:
        width = config.get("head_dim", rotated)
        valid = isinstance(rotated, int) and isinstance(width, int) and width > 0
        # 0 is refused later, with the name of the key.
        keys = {"head_dim": width, "partial_rotary_factor": rotated / width if valid else 0.0}
    factor = metadata.get(f"{prefix}{_ROPE}factor", metadata.get(f"{prefix}rope.scale_linear"))
    scaling = metadata.get(f"{prefix}{_ROPE}type", "linear")
    if scaling == "linear" and not factor:
        scaling = "none"
    if not isinstance(scaling, str) or scaling not in ("none", "linear", "yarn"):
        raise CheckpointError(
            f"{where}: rope scaling of the type {scaling!r:.80} does not run in GGUF"
        )
    rope: dict[str, Any] = {"rope_theta": theta}
    if scaling == "none":
        return {**keys, "rope_parameters": {**rope, "rope_type": "default"}}
    rope |= {"rope_type": scaling, "factor": factor}
    if scaling == "yarn":
        numbers = {
            "original_max_position_embeddings": "original_context_length",
            "beta_fast": "yarn_beta_fast",
            "beta_slow": "yarn_beta_slow",
        }
        rope |= {key: metadata.get(f"{prefix}{_ROPE}{name}") for key, name in numbers.items()}
        # llama.cpp's converter writes a tenth of DeepSeek's mscale_all_dim, which equals its
        # mscale.
        if isinstance(logarithmic := metadata.get(f"{prefix}{_ROPE}yarn_log_multiplier"), float):
            rope |= dict.fromkeys(("mscale", "mscale_all_dim"), 10 * logarithmic)
        if (beta := metadata.get(f"{prefix}attention.temperature_scale")) is not None:
            rope["llama_4_scaling_beta"] = beta
            original = rope["original_max_position_embeddings"]
            if (
                step := metadata.get(f"{prefix}attention.temperature_length", original)
            ) != original:
                raise CheckpointError(
                    f"{where}: queries that grow every {step!r:.80} tokens, and not with the "
                    f"original context ({original!r:.80}), do not run"
                )
        # The metadata lacks this key. Of these families, only gpt-oss sets it to false.
        rope["truncate"] = model_type != "gpt_oss"
    return {**keys, "rope_parameters": rope}
