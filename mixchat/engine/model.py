"""The transformer, from token ids to logits. It does not know where experts are.

T = tokens of this call, P = tokens before them (in the cache), D = hidden_size, V = vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch

from mixchat.base.model_config import ModelConfig
from mixchat.base.safetensors import TensorSpec
from mixchat.engine.attention import Attention, KVContext, SingleTokenContext
from mixchat.engine.moe import Routing, SparseMoE
from mixchat.engine.norm import RMSNorm
from mixchat.engine.rope import RotaryEmbedding
from mixchat.experts.holder import ExpertRunner
from mixchat.kernels import rows
from mixchat.kernels.program import Stage, alone
from mixchat.kernels.router import Router
from mixchat.weights.format.blueprint import HEAD, Blueprint, Expert
from mixchat.weights.matrix.linear import LinearSpec
from mixchat.weights.matrix.quant_type import Linear, RecordRows

LAST = slice(-1, None)

AfterLayer = Callable[[int], object]
Embedding = Callable[[torch.Tensor], torch.Tensor]  # from ids [T], on the CPU, to rows [T, D]


class ModelTensors(Protocol):
    """The tensors of a model on the device that computes it."""

    def tensor(self, spec: TensorSpec) -> torch.Tensor: ...

    def linear(self, spec: LinearSpec) -> Linear:
        """Return a matrix in this form, which may differ from the stored one."""


class Block:
    """One layer, attention and then the experts."""

    def __init__(
        self, attention_norm: RMSNorm, attention: Attention, moe_norm: RMSNorm, moe: SparseMoE
    ) -> None:
        self._attention_norm, self.attention = attention_norm, attention
        self._moe_norm, self.moe = moe_norm, moe

    @classmethod
    def build(
        cls,
        layer: int,
        used: Blueprint,
        tensors: ModelTensors,
        rope: RotaryEmbedding,
        runner: ExpertRunner,
    ) -> Block:
        config = used.config
        attention_norm, moe_norm, *qk_norms = (
            RMSNorm(tensors.tensor(spec), config.rms_norm_eps)
            for spec in (*used.norms(layer), *used.qk_norms(layer))
        )
        qkv_proj, o_proj = (tensors.linear(spec) for spec in (used.qkv(layer), used.o(layer)))
        sinks = tensors.tensor(used.sinks(layer)) if config.attention_sinks else None
        attention = Attention(layer, config, qkv_proj, o_proj, rope, qk_norms, sinks)
        gate = tensors.tensor(used.gate(layer)).contiguous()
        if not rows.can_compute(gate.dtype, gate.shape[1], gate.device.type):
            gate = gate.float()  # once, and not for each token
        bias = tensors.tensor(used.gate_bias(layer)).float() if config.moe_bias else None
        router = Router(gate, config.num_experts_per_tok, config.norm_topk_prob, bias)
        moe = SparseMoE(layer, router, runner)
        return cls(attention_norm, attention, moe_norm, moe)

    def __call__(self, x: torch.Tensor, before: KVContext, *, exact: bool = False) -> torch.Tensor:
        """Map x [T, D] to [T, D]."""
        x = x + self.attention(self._attention_norm(x), before, exact=exact)
        return x + self.moe(self._moe_norm(x), exact=exact)

    def stages_up_to_router(self, routing: Routing, context: SingleTokenContext) -> list[Stage]:
        """Return stages for one token up to the router, which fill `routing`."""
        x, normed = context.x, context.normed
        return [
            self._attention_norm.stage(x, normed),
            *self.attention.stages(context),
            alone(rows.add_step(x, context.added, x)),
            self._moe_norm.stage(x, normed),
            *self.moe.router_stages(routing, context),
        ]

    def expert_stages(
        self, routing: Routing, context: SingleTokenContext, experts: Sequence[Expert]
    ) -> list[Stage]:
        """Return the stages after the router, if all experts are in memory."""
        x = context.x
        return [
            *self.moe.expert_stages(routing, context, experts),
            alone(rows.add_step(x, context.added, x)),
        ]


class SingleTokenDecoder(Protocol):
    """Computes the blocks for the next token of a cache, with the same bits."""

    def run(
        self, x: torch.Tensor, before: KVContext, after_layer: AfterLayer
    ) -> torch.Tensor | None:
        """Map the token's row [1, D] to the one after all layers, which the next call overwrites.

        Returns None if it cannot be done for this cache.
        """


class Model:
    """Embedding, blocks, norm and head."""

    def __init__(
        self,
        config: ModelConfig,
        embedding: Embedding,
        blocks: Sequence[Block],
        norm: RMSNorm,
        head: Linear,
    ) -> None:
        self.config = config
        self._embedding, self.blocks, self._norm, self._head = embedding, blocks, norm, head
        self._decoder: SingleTokenDecoder | None = None
        self._record_head: RecordRows = lambda rows: None

    @property
    def device(self) -> torch.device:
        return self._norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self._norm.weight.dtype

    def decode_by(self, decoder: SingleTokenDecoder | None) -> None:
        self._decoder = decoder

    def record_inputs(self, used: Blueprint, record: Callable[[str, torch.Tensor], object]) -> None:
        """Record the inputs [T, C] of the matrices of attention and head, with their names.

        All tokens are recorded for the head, although it computes few.
        """
        self._decoder = None  # it would compute without them
        for layer, block in enumerate(self.blocks):
            names = used.qkv(layer).name, used.o(layer).name
            block.attention.record_inputs(*(partial(record, name) for name in names))
        self._record_head = lambda rows: record(HEAD, self._norm(rows))

    def forward(
        self,
        ids: torch.Tensor,
        before: KVContext,
        *,
        exact: bool = False,
        logits_of: slice | list[int] = LAST,
        after_layer: AfterLayer = lambda layer: None,
    ) -> torch.Tensor:
        """Return the logits [n, V] of the last token, or of others. The ids [T] join the cache.

        The ids are on the CPU. The cache must have room for P + T tokens. With `exact` each token
        has the bits that it has alone in a call, if all matrices can be computed so.
        """
        x = self._embedding(ids)  # [T, D]
        decoded = None
        if self._decoder is not None and ids.shape[0] == 1:
            decoded = self._decoder.run(x, before, after_layer)
        x = self._through_blocks(x, before, exact, after_layer) if decoded is None else decoded
        self._record_head(x)
        logits = self._head(self._norm(x[logits_of]), exact=exact)
        before.advance(ids.shape[0])  # last, so that an interrupted pass leaves the cache as it was
        return logits

    def _through_blocks(
        self, x: torch.Tensor, before: KVContext, exact: bool, after_layer: AfterLayer
    ) -> torch.Tensor:
        for layer, block in enumerate(self.blocks):
            x = block(x, before, exact=exact)
            after_layer(layer)
        return x
