"""The kernels of a layer for one token on a GPU, with all that they read and write.

D = hidden_size, H = num_attention_heads, G = num_key_value_heads, h = head_dim, K =
num_experts_per_tok, L = layers with experts, P = partial sums, S = splits of a product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from mixchat.base.model_config import ModelConfig
from mixchat.engine.attention import Attention
from mixchat.engine.device_cache import DeviceKVCache
from mixchat.engine.mlp import DenseMLP
from mixchat.engine.model import Block
from mixchat.kernels.cpu.router import Router
from mixchat.kernels.gpu.attention import Parts, attend
from mixchat.kernels.gpu.experts import experts_down, experts_up
from mixchat.kernels.gpu.heads import heads
from mixchat.kernels.gpu.norm import add_norm
from mixchat.kernels.gpu.product import product, split
from mixchat.kernels.gpu.route import route
from mixchat.weights.format.gpu_expert import GpuExpertForm
from mixchat.weights.matrix.gpu_linear import as_gpu

Kernels = list[Callable[[], object]]


@dataclass
class TokenTensors:
    """The tensors that the layers of a GPU share.

    x, normed: the token's row [D]. past: the tokens before it, int32 [1]. sums: a layer's outputs,
    fp32 [1 + P, D], which the next norm adds to x. The first row is the host's part. selected:
    int32 [L, K]. weights: fp32 [K]. finished: counts programs, int32 [1], and is 0 between kernels.
    """

    x: torch.Tensor
    normed: torch.Tensor
    past: torch.Tensor
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
        device: torch.device,
    ) -> TokenTensors:
        """Return tensors of zeros. sums: P of the layer with most outputs. selected: L and K."""
        zeros = partial(torch.zeros, device=device)
        return cls(
            x=zeros(size, dtype=dtype),
            normed=zeros(size, dtype=dtype),
            past=zeros(1, dtype=torch.int32),
            sums=zeros(1 + sums, size, dtype=torch.float32),
            selected=zeros(*selected, dtype=torch.int32),
            weights=zeros(selected[1], dtype=torch.float32),
            finished=zeros(1, dtype=torch.int32),
        )

    def tensor(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return a tensor that a layer's kernels hand on, in the type of x by default."""
        dtype = dtype or self.x.dtype
        name = f"{name} {shape} {dtype}"
        if name not in self._others:
            self._others[name] = torch.zeros(shape, dtype=dtype, device=self.x.device)
        return self._others[name]


def attention_kernels(
    block: Block,
    added: torch.Tensor,
    config: ModelConfig,
    cache: DeviceKVCache,
    tokens: TokenTensors,
) -> Kernels:
    """Return the kernels of a layer up to the norm before its router.

    added: what is added to x first, fp32 [P, D].
    """
    attention, stored, window = block.mixer, cache.tensors, cache.window
    assert isinstance(attention, Attention)
    count, _, width = attention.shape
    heads_shape = 1, count, width
    qkv, out = as_gpu(attention.qkv_proj).matrix, as_gpu(attention.o_proj).matrix
    sums, outputs = (
        tokens.tensor(name, split(matrix.form).count, 1, matrix.form.rows, dtype=torch.float32)
        for name, matrix in (("qkv", qkv), ("attention", out))
    )
    queries, attended = (tokens.tensor(name, *heads_shape) for name in ("queries", "attended"))
    gates = tokens.tensor("gates", *heads_shape[1:]) if config.attn_output_gate else None
    parts = Parts.for_tokens(1, heads_shape[1], stored, window)
    norms = [norm.weight for norm in attention.qk_norms]
    rope, clip, eps = attention.rope.tables, config.clip_qkv, config.rms_norm_eps
    x, normed, past, finished = tokens.x, tokens.normed, tokens.past, tokens.finished
    return [
        partial(add_norm, x, added, block.mixer_norm.weight, normed, eps, finished),
        partial(product, normed[None], qkv, sums),
        partial(heads, sums[:, 0], queries[0], stored, past, rope, norms, eps, clip, gates),
        partial(attend, queries, stored, past, attended, parts, window, attention.sinks, gates),
        partial(product, attended.view(1, -1), out, outputs),
        partial(add_norm, x, outputs[:, 0], block.mlp_norm.weight, normed, eps, finished),
    ]


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
