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
    Family,
    Slice,
    Tensors,
    attention,
    decoder_tensors,
    expert_prefix,
    latent_attention,
    router,
    with_shared_expert,
)
from mixchat.weights.families.read_config import FAMILIES

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
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
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

    keys: config.json's keys beside `_KEYS`, with llama.cpp's names. fixed: values of config.json
    that no metadata has, because llama.cpp's code fixes them. experts: config.json's key for the
    count of experts. sigmoid: the router takes a sigmoid, not a softmax.
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
_LATENT = {
    **_LATER_DENSE,
    "kv_lora_rank": "attention.kv_lora_rank",
    "num_nextn_predict_layers": "nextn_predict_layers",
}
_ARCHITECTURES["deepseek2"] = _Architecture(
    "deepseek_v3", _LATENT, experts="n_routed_experts", sigmoid=True
)
# Families with a softmax, by the name of an architecture that has both.
_SOFTMAX = {"deepseek2": _Architecture("deepseek_v2", _LATENT, experts="n_routed_experts")}


def gguf_config(
    metadata: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], where: str
) -> dict[str, Any]:
    """Return the config.json of the model with this metadata, and with tensors of these shapes.

    `where` names it in messages. Raises `CheckpointError`.
    """
    name = metadata.get("general.architecture")
    gating = metadata.get(f"{name}.expert_gating_func")
    known = _ARCHITECTURES if gating == 2 else {**_ARCHITECTURES, **_SOFTMAX}
    architecture = known.get(name) if isinstance(name, str) else None
    # llama.cpp calls a dense Llama and a Mixtral "llama". Only the experts distinguish them.
    if architecture is None or (name == "llama" and not metadata.get("llama.expert_count")):
        unsupported = "dense models" if architecture else f"the architecture {name!r:.80}"
        raise CheckpointError(
            f"{where}: mixchat does not run {unsupported}",
            hint=f"It runs mixtures of experts, as GGUF of {', '.join(_ARCHITECTURES)}.",
        )
    keys = {**_KEYS, architecture.experts: "expert_count", **architecture.keys}
    values = {key: metadata.get(f"{name}.{gguf_key}") for key, gguf_key in keys.items()}
    if values["intermediate_size"] is None:
        values["intermediate_size"] = values["moe_intermediate_size"]
    config = {key: value for key, value in values.items() if value is not None}
    for key, value in config.items():
        if not isinstance(value, (bool, int, float)):  # a list has a value for each layer
            raise CheckpointError(
                f"{where}: {key} is {type(value).__name__}, not a number: models with layers of "
                "different shapes do not run"
            )
    # 1 and 3 are a softmax, before or after the choice of experts. 2 is a sigmoid.
    if gating not in (None, 0, *((2,) if architecture.sigmoid else (1, 3))):
        raise CheckpointError(f"{where}: its router computes scores of the kind {gating!r:.80}")
    # The blocks that predict further tokens are counted with the others.
    if predicting := config.get("num_nextn_predict_layers"):
        config["num_hidden_layers"] = config.get("num_hidden_layers", 0) - predicting
    if "kv_lora_rank" in config:
        config |= _latent_heads(metadata, f"{name}.", where)
    return {
        "model_type": architecture.model_type,
        **config,
        **_rope(metadata, f"{name}.", config, architecture.model_type, where),
        **_shown_by(tensors),
        **architecture.fixed,
    }


def _latent_heads(metadata: Mapping[str, Any], prefix: str, where: str) -> dict[str, Any]:
    """Return the heads of latent attention, and the groups of experts that come with it.

    In newer files the lengths of keys and values are those of latents.
    """
    attention = f"{prefix}attention."
    key, value = (
        metadata.get(f"{attention}{x}_length_mla", metadata.get(f"{attention}{x}_length"))
        for x in ("key", "value")
    )
    rotated = metadata.get(f"{prefix}rope.dimension_count")
    if not isinstance(key, int) or not isinstance(rotated, int):
        raise CheckpointError(f"{where}: the columns of its heads are missing")
    groups = metadata.get(f"{prefix}expert_group_count") or 1
    return {
        "q_lora_rank": metadata.get(f"{attention}q_lora_rank"),
        "qk_nope_head_dim": key - rotated,
        "qk_rope_head_dim": rotated,
        "v_head_dim": value,
        "n_group": groups,
        "topk_group": metadata.get(f"{prefix}expert_group_used_count") or 1,
        "topk_method": "greedy" if groups == 1 else "group_limited_greedy",
    }


def _shown_by(tensors: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return the keys of config.json that only the tensors show."""
    bias = "blk.0.attn_q.bias" in tensors
    return {
        "vocab_size": tensors.get(EMBEDDING, (0,))[0],
        "tie_word_embeddings": HEAD not in tensors,
        "attention_bias": bias,
        "qkv_bias": bias,
        "use_qk_norm": "blk.0.attn_q_norm.weight" in tensors,
    }


def _rope(
    metadata: Mapping[str, Any],
    prefix: str,
    config: Mapping[str, Any],
    model_type: str,
    where: str,
) -> dict[str, Any]:
    """Return the rotary embedding, with a head's width and the part of it that is rotated."""
    keys: dict[str, Any] = {}
    rotated = metadata.get(f"{prefix}rope.dimension_count")
    if rotated is not None and "kv_lora_rank" not in config:
        width = config.get("head_dim", rotated)
        valid = isinstance(rotated, int) and isinstance(width, int) and width > 0
        # 0 is refused later, with the name of the key.
        keys = {"head_dim": width, "partial_rotary_factor": rotated / width if valid else 0.0}
    scaling = metadata.get(f"{prefix}{_ROPE}type", "none")
    if not isinstance(scaling, str) or scaling not in ("none", "linear", "yarn"):
        raise CheckpointError(
            f"{where}: rope scaling of the type {scaling!r:.80} does not run in GGUF"
        )
    rope: dict[str, Any] = {"rope_theta": metadata.get(f"{prefix}rope.freq_base", 1e4)}
    if scaling == "none":
        return {**keys, "rope_parameters": {**rope, "rope_type": "default"}}
    rope |= {"rope_type": scaling, "factor": metadata.get(f"{prefix}{_ROPE}factor")}
    if scaling == "yarn":
        numbers = {
            "original_max_position_embeddings": "original_context_length",
            "beta_fast": "yarn_beta_fast",
            "beta_slow": "yarn_beta_slow",
        }
        rope |= {key: metadata.get(f"{prefix}{_ROPE}{name}") for key, name in numbers.items()}
        # A tenth of what sharpens scores. It is also what cos and sin are divided by, so that
        # nothing is left of `mscale`.
        if sharper := metadata.get(f"{prefix}{_ROPE}yarn_log_multiplier"):
            rope |= dict.fromkeys(("mscale", "mscale_all_dim"), 10 * sharper)
        # No metadata has it. Of these families, gpt-oss alone sets it to false.
        rope["truncate"] = model_type != "gpt_oss"
    return {**keys, "rope_parameters": rope}


def gguf_tensors(config: ModelConfig, available: Collection[str]) -> Tensors:
    """Yield the name of each installed tensor, with its slices of the `available` tensors."""
    stacked = any(name.endswith("_exps.weight") for name in available)
    norm = any(_OTHER_NORM in name for name in available)

    def experts(config: ModelConfig, prefix: str) -> Tensors:
        yield from router(config, prefix, "mlp.gate")
        yield from _experts(config, prefix, stacked=stacked)

    moe = with_shared_expert(experts, "mlp.shared_expert")
    family, neighbours = FAMILIES[config.model_type], config.model_type in _ROTATES_NEIGHBOURS
    mixers = {
        **family.mixers,
        "attention": attention(rotates_neighbours=neighbours),
        "latent_attention": _latents if "blk.0.attn_k_b.weight" in available else latent_attention,
    }
    # llama.cpp's converter adds the offsets of norms.
    as_stored = Family(config.model_type, family.read_config, moe, mixers)
    for installed, slices in decoder_tensors(config, as_stored):
        yield installed, tuple(_renamed(source, other_norm=norm) for source in slices)


def _latents(config: ModelConfig, layer: int) -> Tensors:
    """Yield the tensors of latent attention, whose matrices of heads newer files have in stacks."""
    latent = config.kv_lora_rank
    shapes = {
        "k_b_proj": ("k_b", (latent, config.qk_nope_head_dim)),
        "v_b_proj": ("v_b", (config.v_head_dim, latent)),
    }
    for installed, slices in latent_attention(config, layer):
        role = installed.removesuffix(".weight").rpartition(".")[2]
        if role in shapes:
            name, shape = shapes[role]
            stack = f"blk.{layer}.attn_{name}.weight"
            heads = range(config.num_attention_heads)
            yield installed, tuple(Slice(f"{stack}[{head}]", shape) for head in heads)
        else:
            yield installed, slices


def _experts(config: ModelConfig, prefix: str, *, stacked: bool) -> Tensors:
    """Yield a layer's experts. stacked: a tensor has one matrix of all experts, [E, rows, columns].

    Old files of Mixtral have a tensor for each matrix.
    """
    inner, hidden = config.intermediate_size, config.hidden_size
    own = prefix.replace("model.layers.", "blk.")
    for expert in range(config.num_local_experts):
        installed = expert_prefix(prefix, expert)
        gate, up, down = (
            f"{own}ffn_{x}_exps.{{}}[{expert}]" if stacked else f"{own}ffn_{x}.{expert}.{{}}"
            for x in ("gate", "up", "down")
        )
        for parameter, width in (
            ("weight", (hidden,)),
            *([("bias", ())] if config.moe_bias else []),
        ):
            rows = (inner, *width)
            yield (
                f"{installed}w13.{parameter}",
                tuple(Slice(x.format(parameter), rows) for x in (gate, up)),
            )
        factor = config.residual_multiplier
        yield (
            f"{installed}w2.weight",
            (Slice(down.format("weight"), (hidden, inner), factor=factor),),
        )
        if config.moe_bias:
            yield f"{installed}w2.bias", (Slice(down.format("bias"), (hidden,)),)


def _renamed(source: Slice, *, other_norm: bool) -> Slice:
    """Return the slice with llama.cpp's name."""
    match = _LAYER.fullmatch(source.name)
    if match is None:
        return replace(source, name=_NAMES.get(source.name, source.name))
    layer, name, suffix = match.groups(default="")
    own = _NAMES[name]
    if own == "ffn_norm" and other_norm:
        own = _OTHER_NORM
    # The gate [1, D] of a shared expert is a vector [D] there.
    shape = source.shape[1:] if own == "ffn_gate_inp_shexp" else source.shape
    return replace(source, name=f"blk.{layer}.{own}{suffix}", shape=shape)
