"""The tensors of a model in GGUF, which have llama.cpp's names, the same in all families."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace

from mixchat.base.model_config import ModelConfig
from mixchat.weights.families.family import (
    Family,
    Slice,
    Tensors,
    decoder_tensors,
    expert_prefix,
    router,
    with_shared_expert,
)
from mixchat.weights.families.gguf_mixers import gguf_mixers
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
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "mixer_out_norm": "post_attention_norm",
    "post_feedforward_layernorm_1": "post_ffw_norm_1",
    "pre_feedforward_layernorm_2": "pre_ffw_norm_2",
    "post_feedforward_layernorm_2": "post_ffw_norm_2",
    "post_feedforward_layernorm": "post_ffw_norm",
    "layer_scalar": "layer_output_scale.weight",
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "conv.in_proj": "shortconv.in_proj",
    "conv.conv": "shortconv.conv",
    "conv.out_proj": "shortconv.out_proj",
}
# The axis of length 1 that a tensor lacks there.
_SQUEEZED = {"ffn_gate_inp_shexp": 0, "shortconv.conv": 1}
# A name that some families have if they lack another one.
_OTHER_NAMES = {"ffn_norm": "post_attention_norm", "output_norm.weight": "token_embd_norm.weight"}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+?)(\.weight|\.bias)?")
# The rotated pairs of these are side by side. llama.cpp's converter turns Mixtral's and Granite's.
_ROTATES_NEIGHBOURS = ("mixtral", "granitemoe", "granitemoehybrid", "ernie4_5_moe")


def gguf_tensors(config: ModelConfig, available: Collection[str]) -> Tensors:
    """Yield the name of each installed tensor, with its slices of the `available` tensors."""
    kinds = {name.split(".", 2)[2] if name.startswith("blk.") else name for name in available}
    bare = {name.removesuffix(".weight") for name in kinds} | kinds
    names = {usual: own for usual, own in _OTHER_NAMES.items() if own in bare and usual not in bare}
    family, neighbours = FAMILIES[config.model_type], config.model_type in _ROTATES_NEIGHBOURS

    def routed(config: ModelConfig, prefix: str) -> Tensors:
        yield from router(config, prefix, "mlp.gate")
        yield from _experts(config, prefix, kinds)

    dense = "mlp.shared_expert" if "ffn_up_shexp.weight" in kinds else "mlp"

    def moe(config: ModelConfig, prefix: str) -> Tensors:
        usual = dict(with_shared_expert(routed, dense)(config, prefix))
        yield from usual.items()
        # Norms and numbers of the family's own.
        own = family.moe(config, prefix)
        yield from ((name, slices) for name, slices in own if name not in usual)

    mixers = gguf_mixers(kinds, rotates_neighbours=neighbours)
    # llama.cpp's converter adds the offsets of norms.
    as_stored = Family(config.model_type, family.read_config, moe, mixers)
    for installed, slices in decoder_tensors(config, as_stored):
        yield installed, tuple(_renamed(source, names) for source in slices)


def _experts(config: ModelConfig, prefix: str, available: Collection[str]) -> Tensors:
    """Yield a layer's experts, of which a tensor [E, rows, columns] has one matrix of each.

    It may have two, gate above up. Old files of Mixtral have a tensor for each matrix.
    """
    inner, hidden = config.intermediate_size, config.hidden_size
    own = prefix.replace("model.layers.", "blk.")
    parts = ("gate_up",) if "ffn_gate_up_exps.weight" in available else ("gate", "up")
    stacked = "ffn_down_exps.weight" in available
    for expert in range(config.num_local_experts):
        installed = expert_prefix(prefix, expert)
        *gate_up, down = (
            f"{own}ffn_{x}_exps.{{}}[{expert}]" if stacked else f"{own}ffn_{x}.{expert}.{{}}"
            for x in (*parts, "down")
        )
        for parameter, width in (
            ("weight", (hidden,)),
            *([("bias", ())] if config.moe_bias else []),
        ):
            rows = (2 * inner // len(parts), *width)
            yield (
                f"{installed}w13.{parameter}",
                tuple(Slice(x.format(parameter), rows) for x in gate_up),
            )
        factor = config.residual_multiplier
        yield (
            f"{installed}w2.weight",
            (Slice(down.format("weight"), (hidden, inner), factor=factor),),
        )
        if config.moe_bias:
            yield f"{installed}w2.bias", (Slice(down.format("bias"), (hidden,)),)


def _renamed(source: Slice, other_names: Mapping[str, str]) -> Slice:
    """Return the slice with llama.cpp's name. `other_names` are those that the file has."""
    match = _LAYER.fullmatch(source.name)
    if match is None:
        own = _NAMES.get(source.name, source.name)
        return replace(source, name=other_names.get(own, own))
    layer, name, suffix = match.groups(default="")
    own = other_names.get(_NAMES[name], _NAMES[name])
    shape, axis = source.shape, _SQUEEZED.get(own)
    shape = shape if axis is None else shape[:axis] + shape[axis + 1 :]
    return replace(source, name=f"blk.{layer}.{own}{suffix}", shape=shape)
