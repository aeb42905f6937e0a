"""The tensors of the part of a layer that mixes tokens, its mixer.

A layer has one of five: attention, attention to latents (MLA), a Gated DeltaNet ("linear
attention"), a short convolution, or Mamba2. D = hidden_size, H = num_attention_heads, h = head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from mixchat.base.model_config import MixerType, ModelConfig
from mixchat.base.safetensors import TensorSpec
from mixchat.weights.families.family import layer_prefix
from mixchat.weights.matrix.linear import LinearSpec


@dataclass(frozen=True)
class MixerSpec:
    """The matrices and the other tensors of a mixer, by their roles, in their order on disk.

    A role is a name in the mixer's class, such as "qkv_proj". The names of all weights of norms end
    with "norm".
    """

    matrices: dict[str, LinearSpec]
    tensors: dict[str, TensorSpec]

    def all_tensors(self) -> Iterator[TensorSpec]:
        for matrix in self.matrices.values():
            yield from matrix.tensors
        yield from self.tensors.values()

    @property
    def norms(self) -> list[TensorSpec]:
        return [tensor for role, tensor in self.tensors.items() if role.endswith("norm")]


@dataclass(frozen=True)
class LayerSpecs:
    """Makes the specs of one layer's tensors. `linear` is `Blueprint.linear` for attention."""

    config: ModelConfig
    layer: int
    linear: Callable[..., LinearSpec]
    dtype: torch.dtype
    norm_dtype: torch.dtype

    def matrix(
        self, name: str, rows: int, columns: int, *, bias: bool = False, parts: int = 1
    ) -> LinearSpec:
        """Return a matrix in the type of attention. parts: how many parts of it are used apart."""
        linear = self.linear(f"{layer_prefix(self.layer)}{name}", rows, columns, parts=parts)
        return replace(linear, bias=bias)

    def tensor(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> TensorSpec:
        """Return a tensor that is never quantized, by default in the model's type."""
        return TensorSpec(f"{layer_prefix(self.layer)}{name}", dtype or self.dtype, shape)

    def norm(self, name: str, columns: int) -> TensorSpec:
        """Return the weights of a norm."""
        return self.tensor(name, columns, dtype=self.norm_dtype)


def _attention(specs: LayerSpecs) -> MixerSpec:
    """Return q above k above v, and above the gates if attention has an output gate.

    If values are keys, there is no v.
    """
    config = specs.config
    hidden = specs.config.hidden_size
    heads, groups, width = config.attention_shape(specs.layer)
    own_values = 0 if config.values_are_keys(specs.layer) else groups
    rows = (heads * (2 if config.attn_output_gate else 1) + groups + own_values) * width
    bias = config.attention_bias
    own = "self_attn."
    qkv = specs.matrix(f"{own}qkv_proj", rows, hidden, bias=bias or config.qkv_bias)
    out = specs.matrix(f"{own}o_proj", hidden, heads * width, bias=bias)
    tensors = {}
    if config.qk_norm is not None:
        together = config.qk_norm == "projection"
        for role, count in (("q_norm", heads), ("k_norm", groups)):
            columns = count * width if together else width
            tensors[role] = specs.norm(f"{own}{role}.weight", columns)
    if config.attention_sinks:  # a logit for each head, which is added to the sum of its softmax
        tensors["sinks"] = specs.tensor(f"{own}sinks", heads)
    if config.attn_head_gate:
        tensors["g_proj"] = specs.tensor(f"{own}g_proj.weight", heads, hidden)
    return MixerSpec({"qkv_proj": qkv, "o_proj": out}, tensors)


def _latent_attention(specs: LayerSpecs) -> MixerSpec:
    """Return the matrices that make the latents, and those that make heads of them.

    In `a_proj` the latent of queries is above the latent of keys and values. Without a latent of
    queries, the queries themselves are there. Of the queries, the columns of all heads that do not
    rotate come first, then those that rotate. `k_b_proj` has a matrix for each head, from its query
    to the latent of keys, one above the other. `v_b_proj` has a matrix for each head, from the
    latent to its value.
    """
    config = specs.config
    hidden = specs.config.hidden_size
    own = "self_attn."
    heads = config.num_attention_heads
    latent = config.kv_lora_rank
    queries = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
    bias = config.attention_bias
    rows = latent + config.qk_rope_head_dim
    a_rows = (config.q_lora_rank or queries) + rows
    matrices = {"a_proj": specs.matrix(f"{own}a_proj", a_rows, hidden, bias=bias)}
    tensors = {}
    if config.q_lora_rank:
        matrices["q_b_proj"] = specs.matrix(f"{own}q_b_proj", queries, config.q_lora_rank)
        tensors["q_a_norm"] = specs.norm(f"{own}q_a_norm.weight", config.q_lora_rank)
    columns = config.qk_nope_head_dim
    values = heads * config.v_head_dim
    matrices["k_b_proj"] = specs.matrix(f"{own}k_b_proj", heads * latent, columns, parts=heads)
    matrices["v_b_proj"] = specs.matrix(f"{own}v_b_proj", values, latent, parts=heads)
    matrices["o_proj"] = specs.matrix(f"{own}o_proj", hidden, values, bias=bias)
    tensors["kv_a_norm"] = specs.norm(f"{own}kv_a_norm.weight", latent)
    return MixerSpec(matrices, tensors)


def _delta_net(specs: LayerSpecs) -> MixerSpec:
    """Return q above k above v above z, which gates the output, and the small matrix of b and a.

    This norm always rounds before it multiplies by its weights.
    """
    config = specs.config
    hidden = specs.config.hidden_size
    own = "linear_attn."
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    heads = config.linear_num_value_heads
    width = config.linear_value_head_dim
    channels = 2 * keys + heads * width
    values = heads * width
    matrices = {
        "in_proj": specs.matrix(f"{own}in_proj", channels + values, hidden),
        "out_proj": specs.matrix(f"{own}out_proj", hidden, values),
    }
    tensors = {
        "ba_proj": specs.tensor(f"{own}ba_proj.weight", 2 * heads, hidden),
        "conv1d": specs.tensor(f"{own}conv1d.weight", channels, config.linear_conv_kernel_dim),
        "dt_bias": specs.tensor(f"{own}dt_bias", heads, dtype=torch.float32),
        "A_log": specs.tensor(f"{own}A_log", heads, dtype=torch.float32),
        "norm": specs.tensor(f"{own}norm.weight", width),
    }
    return MixerSpec(matrices, tensors)


def _short_conv(specs: LayerSpecs) -> MixerSpec:
    """Return the projection to b above c above x, the convolution, and the output's."""
    config = specs.config
    hidden = specs.config.hidden_size
    own = "conv."
    matrices = {
        "in_proj": specs.matrix(f"{own}in_proj", 3 * hidden, hidden),
        "out_proj": specs.matrix(f"{own}out_proj", hidden, hidden),
    }
    conv = specs.tensor(f"{own}conv.weight", hidden, config.conv_L_cache)
    return MixerSpec(matrices, {"conv": conv})


def _mamba(specs: LayerSpecs) -> MixerSpec:
    """Return C above B above x above z, which gates the output, and the small matrix of dt.

    The roles and their order are a DeltaNet's, because the same description computes it.
    """
    config = specs.config
    hidden = specs.config.hidden_size
    own = "mamba."
    groups, heads, state, width = config.mamba_shape
    values = heads * width
    channels = 2 * groups * state + values
    matrices = {
        "in_proj": specs.matrix(f"{own}in_proj", channels + values, hidden),
        "out_proj": specs.matrix(f"{own}out_proj", hidden, values),
    }
    tensors = {
        "ba_proj": specs.tensor(f"{own}dt_proj.weight", heads, hidden),
        "conv1d": specs.tensor(f"{own}conv1d.weight", channels, config.mamba_d_conv),
        "dt_bias": specs.tensor(f"{own}dt_bias", heads, dtype=torch.float32),
        "A_log": specs.tensor(f"{own}A_log", heads, dtype=torch.float32),
        "D": specs.tensor(f"{own}D", heads, dtype=torch.float32),
        "norm": specs.tensor(f"{own}norm.weight", values),
    }
    if config.mamba_conv_bias:
        tensors["conv1d_bias"] = specs.tensor(f"{own}conv1d.bias", channels)
    return MixerSpec(matrices, tensors)


MIXERS: dict[MixerType, Callable[[LayerSpecs], MixerSpec]] = {
    "attention": _attention,
    "latent_attention": _latent_attention,
    "linear_attention": _delta_net,
    "conv": _short_conv,
    "mamba": _mamba,
}
