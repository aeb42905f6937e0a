"""A model in GGUF, whose metadata and tensors have llama.cpp's names, the same in all families.

llama.cpp calls a family an architecture, and fixes in its code what a config.json may say.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mixchat.base.errors import CheckpointError
from mixchat.base.model_config import ModelConfig
from mixchat.weights.families.family import (
    Slice,
    Tensors,
    decoder_tensors,
    expert_prefix,
    router,
    with_shared_expert,
)

EMBEDDING, HEAD, ROUTER = "token_embd.weight", "output.weight", "ffn_gate_inp"
# llama.cpp's name for each name of Hugging Face, in a layer and outside of them.
_NAMES = {
    "model.embed_tokens.weight": EMBEDDING,
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": HEAD,
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.sinks": "attn_sinks.weight",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": ROUTER,
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}
_OTHER_NORM = "post_attention_norm"  # in place of ffn_norm
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+?)(\.weight|\.bias)?")
# The rotated pairs of these are side by side. llama.cpp's converter turns Mixtral's and Granite's.
_ROTATES_NEIGHBOURS = ("mixtral", "granitemoe", "ernie4_5_moe")

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
    "minimax-m2": _Architecture("minimax_m2", experts="num_local_experts", sigmoid=True),
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


def gguf_tensors(config: ModelConfig, available: Collection[str]) -> Tensors:
    """Yield the name of each installed tensor, with its slices of the `available` tensors."""
    stacked = any(name.endswith("_exps.weight") for name in available)
    norm = any(_OTHER_NORM in name for name in available)

    def experts(config: ModelConfig, prefix: str) -> Tensors:
        yield from router(config, prefix, "mlp.gate")
        yield from _experts(config, prefix, stacked=stacked)

    moe = with_shared_expert(experts, "mlp.shared_expert")
    neighbours = config.model_type in _ROTATES_NEIGHBOURS
    for installed, slices in decoder_tensors(config, moe, rotates_neighbours=neighbours):
        yield installed, tuple(_renamed(each, other_norm=norm) for each in slices)


def _experts(config: ModelConfig, prefix: str, *, stacked: bool) -> Tensors:
    """Yield a layer's experts. Old files of Mixtrals have each matrix for itself."""
    inner, hidden = config.intermediate_size, config.hidden_size
    own = prefix.replace("model.layers.", "blk.")
    for expert in range(config.num_local_experts):
        installed = expert_prefix(prefix, expert)
        gate, up, down = (
            f"{own}ffn_{x}_exps.{{}}[{expert}]" if stacked else f"{own}ffn_{x}.{expert}.{{}}"
            for x in ("gate", "up", "down")
        )
        for kind, width in (("weight", (hidden,)), *([("bias", ())] if config.moe_bias else [])):
            rows = (inner, *width)
            yield f"{installed}w13.{kind}", tuple(Slice(x.format(kind), rows) for x in (gate, up))
        factor = config.residual_multiplier
        yield (
            f"{installed}w2.weight",
            (Slice(down.format("weight"), (hidden, inner), factor=factor),),
        )
        if config.moe_bias:
            yield f"{installed}w2.bias", (Slice(down.format("bias"), (hidden,)),)


def _renamed(source: Slice, *, other_norm: bool) -> Slice:
    """Return the slice with llama.cpp's name. The gate of a shared expert has no rows there."""
    match = _LAYER.fullmatch(source.name)
    if match is None:
        return replace(source, name=_NAMES.get(source.name, source.name))
    layer, name, kind = match.groups(default="")
    own = _NAMES[name]
    if own == "ffn_norm" and other_norm:
        own = _OTHER_NORM
    shape = source.shape[1:] if own == "ffn_gate_inp_shexp" else source.shape
    return replace(source, name=f"blk.{layer}.{own}{kind}", shape=shape)
