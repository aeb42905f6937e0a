"""The tensors of a model in GGUF, which have the same names in all families."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace

from mixchat.base.model_config import ModelConfig
from mixchat.weights.families.family import Slice, Tensors
from mixchat.weights.families.tensors import (
    decoder_tensors,
    expert_prefix,
    router,
    shared_expert,
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


def gguf_tensors(config: ModelConfig, available: Collection[str]) -> Tensors:
    """Yield the name of each installed tensor, with its slices of the `available` tensors."""
    stacked = any(name.endswith("_exps.weight") for name in available)
    norm = any(_OTHER_NORM in name for name in available)

    def moe(config: ModelConfig, prefix: str) -> Tensors:
        yield from router(config, prefix, "mlp.gate")
        yield from _experts(config, prefix, stacked=stacked)
        if config.shared_expert_intermediate_size:
            yield from shared_expert(config, prefix, "mlp.shared_expert")

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
