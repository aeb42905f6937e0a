"""The mixers of a model in GGUF, whose rows and columns llama.cpp's converter has moved."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from mixchat.base.model_config import MixerType, ModelConfig
from mixchat.weights.families.family import (
    MixerTensors,
    Slice,
    Tensors,
    attention,
    latent_attention,
    short_conv,
)
from mixchat.weights.families.granitemoehybrid import mamba
from mixchat.weights.families.qwen3_next import in_proj


def gguf_mixers(
    available: Collection[str], *, rotates_neighbours: bool
) -> dict[MixerType, MixerTensors]:
    """Return the descriptions of mixers in a file whose layers have these tensors."""
    return {
        "attention": attention(rotates_neighbours=rotates_neighbours),
        "latent_attention": _split_latents if "attn_k_b.weight" in available else latent_attention,
        "linear_attention": _delta_net(
            tiled="ssm_alpha.weight" in available, joined="ssm_in.weight" in available
        ),
        "conv": short_conv,
        "mamba": _mamba,
    }


def _split_latents(config: ModelConfig, layer: int) -> Tensors:
    """Describe latent attention whose heads' keys and values are stacks, the keys transposed."""
    latent, own = config.kv_lora_rank, f"blk.{layer}.attn_{{}}_b.weight[{{}}]"
    stacks = {
        "k_b_proj.weight": ("k", (latent, config.qk_nope_head_dim)),
        "v_b_proj.weight": ("v", (config.v_head_dim, latent)),
    }
    for installed, slices in latent_attention(config, layer):
        x, shape = stacks.get(installed.rpartition("self_attn.")[2], ("", ()))
        heads = (Slice(own.format(x, head), shape) for head in range(config.num_attention_heads))
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
        hidden, each = config.hidden_size, heads // keys
        own, to, mixed = f"blk.{layer}.", f"model.layers.{layer}.linear_attn.", 2 * keys * key
        places = [head % each * keys + head // each if tiled else head for head in range(heads)]

        def by_head(name: str, *columns: int, width: int = 1, start: int = 0) -> list[Slice]:
            """Return the rows of value heads in a tensor that has them from a row on."""
            shape = (start + heads * width, *columns)
            first = [Slice(own + name, shape, range(start))] if start else []
            rows = (range(start + n * width, start + (n + 1) * width) for n in places)
            return [*first, *(Slice(own + name, shape, part) for part in rows)]

        if joined:
            name, slices = next(in_proj(config, to))
            yield name, tuple(replace(source, name=f"{own}ssm_in.weight") for source in slices)
        else:
            qkv = by_head("attn_qkv.weight", hidden, width=value, start=mixed)
            gates = by_head("attn_gate.weight", hidden, width=value)
            yield f"{to}in_proj.weight", (*qkv, *gates)
        if tiled:
            rates = by_head("ssm_beta.weight", hidden)
            yield f"{to}ba_proj.weight", (*rates, *by_head("ssm_alpha.weight", hidden))
        else:
            starts = [head * 2 * each + part for part in (0, each) for head in range(keys)]
            name, shape = f"{own}ssm_ba.weight", (2 * heads, hidden)
            both = (Slice(name, shape, range(start, start + each)) for start in starts)
            yield f"{to}ba_proj.weight", tuple(both)
        columns = tuple(at for n in places for at in range(n * value, (n + 1) * value))
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
