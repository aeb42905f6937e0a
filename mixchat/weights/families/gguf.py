"""The tensors of a model in GGUF, which have llama.cpp's names, the same in all families.

llama.cpp's converter has moved the rows and columns of some mixers.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace

from mixchat.base.model_config import ModelConfig
from mixchat.weights.families.family import (
    Family,
    MixerTensors,
    Slice,
    Tensors,
    attention,
    decoder_tensors,
    expert_prefix,
    latent_attention,
    router,
    short_conv,
    with_shared_expert,
)
from mixchat.weights.families.granite import mamba
from mixchat.weights.families.qwen import next_in_proj
from mixchat.weights.families.read_config import FAMILIES

EMBEDDING = "token_embd.weight"
HEAD = "output.weight"
ROUTER = "ffn_gate_inp"
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
# The axis of length 1 that a tensor lacks in GGUF.
_SQUEEZED = {"ffn_gate_inp_shexp": 0, "shortconv.conv": 1}
# GGUF's other name of a tensor, for files that lack the usual one.
_OTHER_NAMES = {"ffn_norm": "post_attention_norm", "output_norm.weight": "token_embd_norm.weight"}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+?)(\.weight|\.bias)?")
# In files of these families rotated pairs are side by side. llama.cpp's converter reorders the rows
# of Mixtral and Granite.
_ROTATES_NEIGHBOURS = ("mixtral", "granitemoe", "granitemoehybrid", "ernie4_5_moe")


def gguf_tensors(config: ModelConfig, available: Collection[str]) -> Tensors:
    """Yield the name of each installed tensor, with its slices of the `available` tensors."""
    kinds = {name.split(".", 2)[2] if name.startswith("blk.") else name for name in available}
    bare = {name.removesuffix(".weight") for name in kinds} | kinds
    names = {usual: own for usual, own in _OTHER_NAMES.items() if own in bare and usual not in bare}
    family = FAMILIES[config.model_type]

    def routed(config: ModelConfig, prefix: str) -> Tensors:
        yield from router(config, prefix, "mlp.gate")
        yield from _experts(config, prefix, kinds)

    dense = "mlp.shared_expert" if "ffn_up_shexp.weight" in kinds else "mlp"

    def moe(config: ModelConfig, prefix: str) -> Tensors:
        usual = dict(with_shared_expert(routed, dense)(config, prefix))
        yield from usual.items()
        # Further norms and numbers, which only some families have.
        own = family.moe(config, prefix)
        yield from ((name, slices) for name, slices in own if name not in usual)

    # Norms have no offset, because llama.cpp's converter adds it.
    as_stored = Family(
        config.model_type,
        family.read_config,
        moe,
        {
            "attention": attention(rotates_neighbours=config.model_type in _ROTATES_NEIGHBOURS),
            "latent_attention": _split_latents if "attn_k_b.weight" in kinds else latent_attention,
            "linear_attention": _delta_net(
                tiled="ssm_alpha.weight" in kinds, joined="ssm_in.weight" in kinds
            ),
            "conv": short_conv,
            "mamba": _mamba,
        },
    )
    for installed, slices in decoder_tensors(config, as_stored):
        yield installed, tuple(_renamed(source, names) for source in slices)


def _experts(config: ModelConfig, prefix: str, available: Collection[str]) -> Tensors:
    """Yield a layer's experts, of which a tensor [E, rows, columns] has one matrix of each.

    It may have two, gate above up. Old files of Mixtral have a tensor for each matrix.
    """
    inner = config.intermediate_size
    hidden = config.hidden_size
    own = prefix.replace("model.layers.", "blk.")
    parts = ("gate_up",) if "ffn_gate_up_exps.weight" in available else ("gate", "up")
    stacked = "ffn_down_exps.weight" in available
    experts = config.num_local_experts
    stack = (experts,) if stacked else ()
    up_rows = 2 * inner // len(parts)
    factor = config.residual_multiplier
    for expert in range(experts):
        installed = expert_prefix(prefix, expert)
        *gate_up, down = (
            f"{own}ffn_{x}_exps.{{}}[{expert}]" if stacked else f"{own}ffn_{x}.{expert}.{{}}"
            for x in (*parts, "down")
        )
        up = (Slice(name.format("weight"), (*stack, up_rows, hidden)) for name in gate_up)
        yield f"{installed}w13.weight", tuple(up)
        if config.moe_bias:
            biases = (Slice(name.format("bias"), (*stack, up_rows)) for name in gate_up)
            yield f"{installed}w13.bias", tuple(biases)
        w2 = Slice(down.format("weight"), (*stack, hidden, inner), factor=factor)
        yield f"{installed}w2.weight", (w2,)
        if config.moe_bias:
            yield f"{installed}w2.bias", (Slice(down.format("bias"), (*stack, hidden)),)


def _renamed(source: Slice, other_names: Mapping[str, str]) -> Slice:
    """Return the slice with llama.cpp's name. `other_names` are those that the file has."""
    match = _LAYER.fullmatch(source.name)
    if match is None:
        own = _NAMES.get(source.name, source.name)
        return replace(source, name=other_names.get(own, own))
    layer, name, suffix = match.groups(default="")
    own = other_names.get(_NAMES[name], _NAMES[name])
    shape = source.shape
    axis = _SQUEEZED.get(own)
    shape = shape if axis is None else shape[:axis] + shape[axis + 1 :]
    return replace(source, name=f"blk.{layer}.{own}{suffix}", shape=shape)


def _split_latents(config: ModelConfig, layer: int) -> Tensors:
    """Describe latent attention with stacks of the heads' matrices, transposed for the keys."""
    latent = config.kv_lora_rank
    own = f"blk.{layer}.attn_{{}}_b.weight[{{}}]"
    count = config.num_attention_heads
    stacks = {
        "k_b_proj.weight": ("k", (count, latent, config.qk_nope_head_dim)),
        "v_b_proj.weight": ("v", (count, config.v_head_dim, latent)),
    }
    for installed, slices in latent_attention(config, layer):
        x, shape = stacks.get(installed.rpartition("self_attn.")[2], ("", ()))
        heads = (Slice(own.format(x, head), shape) for head in range(count))
        yield installed, tuple(heads) if x else slices


def _delta_net(*, tiled: bool, joined: bool) -> MixerTensors:
    """Describe a gated DeltaNet.

    tiled: values come in the order of Qwen3.5's files, the first value head of each key head, then
    the second one of each. With 2 key heads of 2 value heads, the value heads 0 1 2 3 lie there as
    0 2 1 3. Qwen3-Next's files have them in order, and the rates and decays of a key head together.
    joined: its first files have the input projection as a checkpoint has it.
    """

    def tensors(config: ModelConfig, layer: int) -> Tensors:
        keys, heads, key, value = config.delta_net_shape
        hidden = config.hidden_size
        each = heads // keys
        own = f"blk.{layer}."
        to = f"model.layers.{layer}.linear_attn."
        mixed = 2 * keys * key
        places = [head % each * keys + head // each if tiled else head for head in range(heads)]

        def by_head(name: str, *columns: int, width: int = 1, start: int = 0) -> list[Slice]:
            """Return the rows of value heads in a tensor that has them from a row on."""
            shape = (start + heads * width, *columns)
            first = [Slice(own + name, shape, range(start))] if start else []
            rows = (range(start + n * width, start + (n + 1) * width) for n in places)
            return [*first, *(Slice(own + name, shape, row_range) for row_range in rows)]

        if joined:
            name, slices = next(next_in_proj(config, to))
            yield name, tuple(replace(source, name=f"{own}ssm_in.weight") for source in slices)
        else:
            qkv = by_head("attn_qkv.weight", hidden, width=value, start=mixed)
            gates = by_head("attn_gate.weight", hidden, width=value)
            yield f"{to}in_proj.weight", (*qkv, *gates)
        if tiled:
            rates = by_head("ssm_beta.weight", hidden)
            yield f"{to}ba_proj.weight", (*rates, *by_head("ssm_alpha.weight", hidden))
        else:
            starts = [head * 2 * each + first for first in (0, each) for head in range(keys)]
            name = f"{own}ssm_ba.weight"
            shape = (2 * heads, hidden)
            both = (Slice(name, shape, range(start, start + each)) for start in starts)
            yield f"{to}ba_proj.weight", tuple(both)
        columns = tuple(range(n * value, (n + 1) * value) for n in places)
        out = Slice(f"{own}ssm_out.weight", (hidden, heads * value))
        yield f"{to}out_proj.weight", (replace(out, columns=columns) if tiled else out,)
        kernel = by_head(
            "ssm_conv1d.weight", config.linear_conv_kernel_dim, width=value, start=mixed
        )
        yield f"{to}conv1d.weight", tuple(kernel)
        yield f"{to}dt_bias", tuple(by_head("ssm_dt.bias"))
        decays = (replace(source, exponentials=True) for source in by_head("ssm_a"))
        yield f"{to}A_log", tuple(decays)
        yield f"{to}norm.weight", (Slice(f"{own}ssm_norm.weight", (value,)),)

    return tensors


def _mamba(config: ModelConfig, layer: int) -> Tensors:
    """Describe Mamba2 with llama.cpp's names and shapes."""
    groups, heads, state, width = config.mamba_shape
    inner = heads * width
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "conv1d.weight": ("ssm_conv1d.weight", (inner + 2 * groups * state, config.mamba_d_conv)),
        "conv1d.bias": ("ssm_conv1d.bias", (inner + 2 * groups * state,)),
        "dt_bias": ("ssm_dt.bias", (heads,)),
        "A_log": ("ssm_a", (heads, 1)),
        "D": ("ssm_d", (heads, 1)),
        "norm.weight": ("ssm_norm.weight", (groups, inner // groups)),
    }
    for installed, slices in mamba(config, layer):
        renamed = []
        for source in slices:
            own = source.name.partition(".mamba.")[2]
            usual = f"ssm_{own.replace('_proj', '')}", source.shape
            name, shape = shapes.get(own, usual)
            own_slice = replace(source, name=f"blk.{layer}.{name}", shape=shape)
            renamed.append(replace(own_slice, exponentials=own == "A_log"))
        yield installed, tuple(renamed)
