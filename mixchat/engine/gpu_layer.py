"""The kernels of a layer for one token on a GPU, with all that they read and write.

D = hidden_size, H = num_attention_heads, G = num_key_value_heads, h = head_dim, K =
num_experts_per_tok, L = layers with experts, P = partial sums, S = splits of a product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch

from mixchat.base.model_config import ModelConfig
from mixchat.engine.attention import Attention
from mixchat.engine.delta_net import GatedDeltaNet
from mixchat.engine.device_cache import DeviceKVCache
from mixchat.engine.latent_attention import HeadMatrices, LatentAttention
from mixchat.engine.layer_cache import LayerCache
from mixchat.engine.mlp import DenseMLP
from mixchat.engine.model import Block, Mixer, SandwichBlock
from mixchat.engine.norm import RMSNorm
from mixchat.engine.sequence_cache import scratch_bytes
from mixchat.engine.short_conv import ShortConv
from mixchat.kernels.cpu.router import Router
from mixchat.kernels.gpu.attention import Parts, attend
from mixchat.kernels.gpu.convolution import gated_convolution
from mixchat.kernels.gpu.delta_net import DeltaNetWeights, delta_net
from mixchat.kernels.gpu.experts import experts_down, experts_up
from mixchat.kernels.gpu.heads import heads
from mixchat.kernels.gpu.latents import Norm, latent_heads, normalized
from mixchat.kernels.gpu.norm import add_norm
from mixchat.kernels.gpu.product import head_products, product, split
from mixchat.kernels.gpu.route import route
from mixchat.weights.format.gpu_expert import GpuExpertForm
from mixchat.weights.matrix.gpu_linear import GpuLinear, as_gpu
from mixchat.weights.matrix.quant_type import Linear

Kernels = list[Callable[[], object]]
_FP32 = torch.float32


@dataclass
class TokenTensors:
    """The tensors that the layers of a GPU share.

    x, normed: the token's row [D]. place: int64, the tokens before it, and then the addresses of
    states before and after it. sums: a layer's outputs, fp32 [1 + P, D], which the next norm adds
    to x. The first row is the host's part. selected: int32 [L, K]. weights: fp32 [K]. finished:
    counts programs, int32 [1], and is 0 between kernels.
    """

    x: torch.Tensor
    normed: torch.Tensor
    place: torch.Tensor
    sums: torch.Tensor
    selected: torch.Tensor
    weights: torch.Tensor
    finished: torch.Tensor
    _others: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def new(
        cls,
        size: int,
        dtype: torch.dtype,
        sums: int,
        selected: tuple[int, int],
        places: int,
        device: torch.device,
    ) -> TokenTensors:
        """Return tensors of zeros.

        sums: P of the layer with most outputs. selected: L and K. places: numbers in `place`.
        """
        zeros = partial(torch.zeros, device=device)
        return cls(
            x=zeros(size, dtype=dtype),
            normed=zeros(size, dtype=dtype),
            place=zeros(places, dtype=torch.int64),
            sums=zeros(1 + sums, size, dtype=torch.float32),
            selected=zeros(*selected, dtype=torch.int32),
            weights=zeros(selected[1], dtype=torch.float32),
            finished=zeros(1, dtype=torch.int32),
        )

    @property
    def past(self) -> torch.Tensor:
        """Return the tokens before the token, int32 [1]."""
        return self.place[:1].view(torch.int32)[:1]

    def tensor(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return a tensor that a layer's kernels hand on, in the type of x by default."""
        dtype = dtype or self.x.dtype
        name = f"{name} {shape} {dtype}"
        if name not in self._others:
            self._others[name] = torch.zeros(shape, dtype=dtype, device=self.x.device)
        return self._others[name]


class LayerSum(NamedTuple):
    """The outputs of a layer, which the norm after it adds to x.

    kernels: make `added`, fp32 [P, D]. factor: multiplies the new x.
    """

    added: torch.Tensor
    kernels: Sequence[Callable[[], object]] = ()
    factor: float | None = None

    def adding(self, norm: RMSNorm, tokens: TokenTensors) -> Kernels:
        """Return the kernels that add the outputs, and normalize the new x."""
        operands = self.added, norm.weight, tokens.normed, norm.eps, tokens.finished
        return [*self.kernels, partial(add_norm, tokens.x, *operands, factor=self.factor)]


def mixer_kernels(
    block: Block,
    before: LayerSum,
    config: ModelConfig,
    cache: LayerCache,
    addresses: torch.Tensor,
    tokens: TokenTensors,
) -> Kernels:
    """Return the kernels of a layer up to the norm before its router.

    before: what is added to x first. addresses: of the layer's states, in their order
    in `state_shapes`, each before and after the token.
    """
    mixer = block.mixer
    if isinstance(mixer, GatedDeltaNet):
        own, outputs = _delta_net_kernels(mixer, addresses, tokens)
    elif isinstance(mixer, ShortConv):
        own, outputs = _convolution_kernels(mixer, addresses, tokens)
    elif isinstance(mixer, LatentAttention):
        assert isinstance(cache, DeviceKVCache)
        own, outputs = _latent_kernels(mixer, cache, tokens)
    else:
        assert isinstance(mixer, Attention)
        assert isinstance(cache, DeviceKVCache)
        own, outputs = _attention_kernels(mixer, config, cache, tokens)
    mixed = LayerSum(outputs)
    if isinstance(block, SandwichBlock):
        out = _outputs(tokens)[:1]
        mixed = LayerSum(out, [_normalized(outputs, block.norms["mixer_out"], out[0], tokens)])
    adding = before.adding(block.mixer_norm, tokens)
    return [*adding, *own, *mixed.adding(block.mlp_norm, tokens)]


def routed_by_own_norm(
    block: SandwichBlock, dense: torch.Tensor, router: Kernels, tokens: TokenTensors
) -> Kernels:
    """Return the kernels of a router between two norms. dense: the dense part's sums, fp32 [P, D].

    The second norm is of what the experts get.
    """
    none = LayerSum(tokens.sums[:0])
    return [
        _normalized(dense, block.norms["mlp_out"], _outputs(tokens)[0], tokens),
        *none.adding(block.norms["router"], tokens),
        *router,
        *none.adding(block.norms["experts"], tokens),
    ]


def sandwich_sum(block: SandwichBlock, sums: torch.Tensor, tokens: TokenTensors) -> LayerSum:
    """Return the outputs of a layer whose experts left these sums, fp32 [P, D]."""
    outputs, added = _outputs(tokens), tokens.tensor("added", 1, *tokens.x.shape, dtype=_FP32)
    kernels = [
        _normalized(sums, block.norms["experts_out"], outputs[1], tokens),
        _normalized(outputs, block.norms["layer_out"], added[0], tokens),
    ]
    return LayerSum(added, kernels, block.scalar)


def _outputs(tokens: TokenTensors) -> torch.Tensor:
    """Return the outputs of a layer's dense part and of its experts, fp32 [2, D]."""
    return tokens.tensor("outputs of parts", 2, *tokens.x.shape, dtype=_FP32)


def _normalized(
    sums: torch.Tensor, norm: RMSNorm, out: torch.Tensor, tokens: TokenTensors
) -> Callable[[], object]:
    """Return the kernel that stores the norm of a sum of rows, fp32 [P, D], in `out` [D]."""
    unused = tokens.tensor("sum of rows", *tokens.x.shape)
    return partial(add_norm, unused, sums, norm.weight, out, norm.eps, tokens.finished, adds=False)


def _product(
    name: str, x: torch.Tensor, linear: Linear, tokens: TokenTensors
) -> tuple[Callable[[], object], torch.Tensor]:
    """Return the kernel of a product with a row [C], and its partial sums, fp32 [S, R]."""
    matrix = as_gpu(linear).matrix
    shape = split(matrix.form).count, 1, matrix.form.rows
    sums = tokens.tensor(name, *shape, dtype=torch.float32)
    return partial(product, x[None], matrix, sums), sums[:, 0]


def _attention_kernels(
    attention: Attention, config: ModelConfig, cache: DeviceKVCache, tokens: TokenTensors
) -> tuple[Kernels, torch.Tensor]:
    """Return the kernels from the normed row to partial sums of the output, fp32 [S, D]."""
    stored, window = cache.tensors, cache.window
    count, _, width = attention.shape
    queries, attended = (tokens.tensor(name, 1, count, width) for name in ("queries", "attended"))
    gates = tokens.tensor("gates", count, width) if config.attn_output_gate else None
    parts = Parts.for_tokens(1, count, stored, window, _scratch(config, tokens))
    norms = [norm.weight for norm in attention.qk_norms]
    rope, clip, eps = attention.rope.tables, config.clip_qkv, config.rms_norm_eps
    past, sinks = tokens.past, attention.sinks
    of_values = {
        "v_norm": attention.v_norm is not None,
        "values_are_keys": attention.values_are_keys,
    }
    project, qkv = _product("qkv", tokens.normed, attention.qkv_proj, tokens)
    project_out, outputs = _product("mixed", attended.view(-1), attention.o_proj, tokens)
    kernels: Kernels = [
        project,
        partial(heads, qkv, queries[0], stored, past, rope, norms, eps, clip, gates, **of_values),
        partial(attend, queries, stored, past, attended, parts, window, sinks, gates),
        project_out,
    ]
    return kernels, outputs


def _delta_net_kernels(
    mixer: GatedDeltaNet, addresses: torch.Tensor, tokens: TokenTensors
) -> tuple[Kernels, torch.Tensor]:
    """Return the kernels from the normed row to partial sums of the output, fp32 [S, D]."""
    rule, norm = mixer.rule, mixer.norm
    heads_shape = rule.shape.value_heads, rule.shape.value_dim
    read, gated = (tokens.tensor(name, *heads_shape) for name in ("read", "gated values"))
    counters = tokens.tensor("heads that have finished", heads_shape[0], dtype=torch.int32)
    convolution, state = mixer.convolution.weight, rule.shape.state_shape
    small = mixer.ba_proj, convolution, rule.rates, rule.biases, norm.weight, norm.eps
    weights = DeltaNetWeights(*small)
    project, projected = _product("projected", tokens.normed, mixer.in_proj, tokens)
    project_out, outputs = _product("mixed", gated.view(-1), mixer.out_proj, tokens)
    places = addresses, state
    update = partial(delta_net, tokens.normed, projected, weights, *places, read, gated, counters)
    return [project, update, project_out], outputs


def _convolution_kernels(
    mixer: ShortConv, addresses: torch.Tensor, tokens: TokenTensors
) -> tuple[Kernels, torch.Tensor]:
    """Return the kernels from the normed row to partial sums of the output, fp32 [S, D]."""
    project, projected = _product("projected", tokens.normed, mixer.in_proj, tokens)
    convolved = tokens.tensor("convolved", mixer.convolution.channels)
    project_out, outputs = _product("mixed", convolved, mixer.out_proj, tokens)
    weight = mixer.convolution.weight
    convolve = partial(gated_convolution, projected, weight, addresses, convolved)
    return [project, convolve, project_out], outputs


def _latent_kernels(
    mixer: LatentAttention, cache: DeviceKVCache, tokens: TokenTensors
) -> tuple[Kernels, torch.Tensor]:
    """Return the kernels from the normed row to partial sums of the output, fp32 [S, D]."""
    config, stored, past = mixer.config, cache.tensors, tokens.past
    count, latent = config.num_attention_heads, config.kv_lora_rank
    whole = tokens.tensor("queries", 1, count, latent + config.qk_rope_head_dim)
    kept = tokens.tensor("kept queries", count, config.qk_nope_head_dim)
    attended = tokens.tensor("attended", 1, count, latent)
    values = tokens.tensor("values of heads", count, config.v_head_dim)
    norms = {role: Norm(norm.weight, norm.eps) for role, norm in mixer.norms.items()}
    project, latents = _product("latents", tokens.normed, mixer.matrices["a_proj"], tokens)
    kernels: Kernels = [project]
    queries = latents
    if config.q_lora_rank:
        row = tokens.tensor("latent of queries", config.q_lora_rank)
        kernels.append(partial(normalized, latents, norms["q_a_norm"], row))
        project, queries = _product("projected", row, mixer.matrices["q_b_proj"], tokens)
        kernels.append(project)
    tables = norms["kv_a_norm"], mixer.rope.tables
    parts = Parts.for_tokens(1, count, stored, None, _scratch(config, tokens))
    project_out, outputs = _product("mixed", values.view(-1), mixer.matrices["o_proj"], tokens)
    kernels += [
        partial(latent_heads, queries, latents, *tables, past, stored, kept, whole[0]),
        _head_products(mixer.heads["k_b_proj"], kept, whole[0]),
        partial(attend, whole, stored, past, attended, parts, scale=cache.shape.score_scale),
        _head_products(mixer.heads["v_b_proj"], attended[0], values),
        project_out,
    ]
    return kernels, outputs


def _scratch(config: ModelConfig, tokens: TokenTensors) -> torch.Tensor:
    """Return the memory of the splits of attention, which all layers and sequences share."""
    size = scratch_bytes(config) // _FP32.itemsize
    return tokens.tensor("splits of attention", size, dtype=_FP32)


def is_supported(mixer: Mixer) -> bool:
    """Return whether there are kernels for a mixer, and for the matrices of its heads."""
    if isinstance(mixer, GatedDeltaNet):
        return mixer.rule.skips is None  # Mamba2 has none
    if not isinstance(mixer, LatentAttention):
        return True
    matrices = (matrix for heads in mixer.heads.values() for matrix in heads.matrices)
    return all(isinstance(matrix, GpuLinear) for matrix in matrices)


def _head_products(heads: HeadMatrices, x: torch.Tensor, out: torch.Tensor) -> Callable[[], object]:
    """Return the kernel of the products of heads x [H, C] with their matrices."""
    matrices = [as_gpu(matrix).matrix for matrix in heads.matrices]
    codes = [matrix.codes for matrix in matrices]
    scales = [
        code if m.absmax is None else m.absmax for m, code in zip(matrices, codes, strict=True)
    ]
    addresses = [[tensor.data_ptr() for tensor in each] for each in (codes, scales)]
    table = torch.tensor(addresses, device=x.device)
    return partial(head_products, x, table, matrices[0].form, matrices[0].levels, out)


def router_kernels(
    router: Router, selected: torch.Tensor, weights: torch.Tensor, tokens: TokenTensors
) -> Kernels:
    """Return the kernels that choose experts of the normed row [K], with their weights [K]."""
    logits = tokens.tensor("logits of experts", len(router.gate), dtype=torch.float32)
    finished = tokens.finished
    return [partial(route, tokens.normed, router, logits, selected, weights, finished)]


def expert_kernels(
    expert: GpuExpertForm,
    table: torch.Tensor,
    selected: torch.Tensor,
    weights: torch.Tensor,
    out: torch.Tensor,
    tokens: TokenTensors,
) -> Kernels:
    """Return the kernels of selected experts, or of a dense part, which write to `out` [P, D].

    table: the addresses of all experts, int64. selected: int32 [K]. weights: of each, fp32 [K].
    """
    form, levels = expert.form, expert.levels
    gated = tokens.tensor("gated", len(selected), form.down.form.columns)
    return [
        partial(experts_up, tokens.normed, selected, table, form, levels, gated),
        partial(experts_down, gated, selected, weights, table, form, levels, out),
    ]


def mlp_kernels(
    form: GpuExpertForm, mlp: DenseMLP, out: torch.Tensor, tokens: TokenTensors
) -> Kernels:
    """Return the kernels of a dense part, an expert that is always chosen, with its own weight."""
    device, network = tokens.x.device, as_gpu(mlp.network.gate_up).matrix
    selected = torch.zeros(1, dtype=torch.int32, device=device)
    weight = torch.ones(1, device=device)
    # Both matrices lie in one block, which begins with the first tensor of the first one.
    first = network.codes if network.absmax is None else network.absmax
    table = torch.tensor([first.data_ptr()], device=device)
    gate = [] if mlp.gate is None else router_kernels(mlp.gate, selected, weight, tokens)
    return [*gate, *expert_kernels(form, table, selected, weight, out, tokens)]
