"""The config.json of a model in GGUF, whose metadata has llama.cpp's names.

llama.cpp calls a family an architecture, and fixes in its code what a config.json may say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mixchat.base.errors import CheckpointError
from mixchat.weights.families.gguf_tensors import EMBEDDING, HEAD

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
    """A family by llama.cpp's name for it.

    keys: of config.json, beside the usual ones. fixed: what llama.cpp always computes with.
    sigmoid: whether its router does not take a softmax.
    """

    model_type: str
    keys: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    experts: str = "num_experts"
    sigmoid: bool = False


_ARCHITECTURES = {
    "llama": _Architecture("mixtral", experts="num_local_experts"),
    "qwen3moe": _Architecture("qwen3_moe", fixed={"norm_topk_prob": True}),
    "qwen2moe": _Architecture(
        "qwen2_moe",
        {"shared_expert_intermediate_size": "expert_shared_feed_forward_length"},
        {"norm_topk_prob": False},
    ),
    "olmoe": _Architecture("olmoe", {"clip_qkv": "attention.clamp_kqv"}, {"norm_topk_prob": False}),
    "granitemoe": _Architecture(
        "granitemoe",
        {
            "attention_multiplier": "attention.scale",
            "embedding_multiplier": "embedding_scale",
            "residual_multiplier": "residual_scale",
            "logits_scaling": "logit_scale",
        },
        experts="num_local_experts",
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
    "glm4moe": _Architecture(
        "glm4_moe",
        {**_LATER_DENSE, "num_nextn_predict_layers": "nextn_predict_layers"},
        experts="n_routed_experts",
        sigmoid=True,
    ),
}


def gguf_config(
    metadata: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], where: str
) -> dict[str, Any]:
    """Return the config.json of the model with this metadata, and with tensors of these shapes.

    `where` names it in messages. Raises `CheckpointError`.
    """
    name = metadata.get("general.architecture")
    family = _ARCHITECTURES.get(name) if isinstance(name, str) else None
    if family is None or (name == "llama" and not metadata.get("llama.expert_count")):
        kind = "dense models" if family else f"the architecture {name!r:.80}"
        raise CheckpointError(
            f"{where}: mixchat does not run {kind}",
            hint=f"It runs mixtures of experts, as GGUF of {', '.join(_ARCHITECTURES)}.",
        )
    keys = {**_KEYS, family.experts: "expert_count", **family.keys}
    given = {key: metadata.get(f"{name}.{theirs}") for key, theirs in keys.items()}
    if given["intermediate_size"] is None:
        given["intermediate_size"] = given["moe_intermediate_size"]
    config = {key: value for key, value in given.items() if value is not None}
    _refuse_lists(config, where)
    _check_router(metadata.get(f"{name}.expert_gating_func"), family, where)
    if predicting := config.get("num_nextn_predict_layers"):
        config["num_hidden_layers"] = config.get("num_hidden_layers", 0) - predicting
    return {
        "model_type": family.model_type,
        **config,
        **_heads(config, metadata.get(f"{name}.rope.dimension_count")),
        **_rope(metadata, f"{name}.", family.model_type, where),
        **_shown_by(tensors),
        **family.fixed,
    }


def _shown_by(tensors: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return what only the tensors tell."""
    bias = "blk.0.attn_q.bias" in tensors
    return {
        "vocab_size": tensors.get(EMBEDDING, (0,))[0],
        "tie_word_embeddings": HEAD not in tensors,
        "attention_bias": bias,
        "qkv_bias": bias,
        "use_qk_norm": "blk.0.attn_q_norm.weight" in tensors,
    }


def _refuse_lists(config: Mapping[str, Any], where: str) -> None:
    for key, value in config.items():
        if not isinstance(value, (bool, int, float)):
            raise CheckpointError(
                f"{where}: {key} is {type(value).__name__}, not a number: models with layers of "
                "different shapes do not run"
            )


def _heads(config: Mapping[str, Any], rotated: Any) -> dict[str, Any]:
    """Return the width of a head, and the part of it that is rotated."""
    if rotated is None:
        return {}
    width = config.get("head_dim", rotated)
    known = isinstance(rotated, int) and isinstance(width, int) and width > 0
    return {"head_dim": width, "partial_rotary_factor": rotated / width if known else 0.0}


def _rope(metadata: Mapping[str, Any], name: str, model_type: str, where: str) -> dict[str, Any]:
    """Return the rotary embedding."""
    kind = metadata.get(f"{name}{_ROPE}type", "none")
    if not isinstance(kind, str) or kind not in ("none", "linear", "yarn"):
        raise CheckpointError(
            f"{where}: rope scaling of the type {kind!r:.80} does not run in GGUF"
        )
    rope: dict[str, Any] = {"rope_theta": metadata.get(f"{name}rope.freq_base", 1e4)}
    if kind == "none":
        return {"rope_parameters": {**rope, "rope_type": "default"}}
    rope |= {"rope_type": kind, "factor": metadata.get(f"{name}{_ROPE}factor")}
    if kind == "yarn":
        numbers = {
            "original_max_position_embeddings": "original_context_length",
            "beta_fast": "yarn_beta_fast",
            "beta_slow": "yarn_beta_slow",
        }
        rope |= {key: metadata.get(f"{name}{_ROPE}{theirs}") for key, theirs in numbers.items()}
        rope["truncate"] = model_type != "gpt_oss"
    return {"rope_parameters": rope}


def _check_router(gating: Any, family: _Architecture, where: str) -> None:
    usual = (2,) if family.sigmoid else (1, 3)  # softmax, before or after the choice
    if gating not in (None, 0, *usual):
        raise CheckpointError(f"{where}: its router computes scores of the kind {gating!r:.80}")
