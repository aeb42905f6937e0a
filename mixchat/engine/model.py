"""The transformer, from token ids to logits. It does not know where experts are.

T = tokens of this call, P = tokens before them (in the cache), D = hidden_size, V = vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch

from mixchat.base import gpu
from mixchat.base.model_config import MixerType, ModelConfig
from mixchat.base.safetensors import TensorSpec
from mixchat.engine.attention import Attention, SingleTokenContext
from mixchat.engine.delta_net import GatedDeltaNet
from mixchat.engine.latent_attention import LatentAttention
from mixchat.engine.mlp import DenseMLP
from mixchat.engine.model_tensors import ModelTensors
from mixchat.engine.moe import Routing, SparseMoE
from mixchat.engine.norm import RMSNorm
from mixchat.engine.rope import RotaryEmbedding
from mixchat.engine.sequence_cache import TokenContext
from mixchat.engine.short_conv import ShortConv
from mixchat.experts.holder import ExpertRunner, LayerExperts
from mixchat.kernels.cpu import rows
from mixchat.kernels.cpu.program import Stage, alone, beside, in_order
from mixchat.kernels.cpu.router import Router
from mixchat.weights.format.blueprint import HEAD, Blueprint
from mixchat.weights.matrix.quant_type import Linear, RecordRows

LAST = slice(-1, None)

AfterLayer = Callable[[int], object]
Embedding = Callable[[torch.Tensor], torch.Tensor]  # from ids [T], on the CPU, to rows [T, D]


class Mixer(Protocol):
    """The part of a layer that mixes tokens."""

    def __call__(
        self, x: torch.Tensor, context: TokenContext, *, exact: bool = False
    ) -> torch.Tensor:
        """Map x [T, D] to [T, D]."""

    def has_stages(self, dtype: torch.dtype) -> bool:
        """Return whether `stages` take hidden states of this type. Matrices are not asked."""

    def stages(self, context: SingleTokenContext) -> list[Stage]:
        """Return `__call__` for one token of each sequence, from `normed` to `added`."""

    def record_inputs(self, records: Mapping[str, RecordRows]) -> None:
        """Record the inputs of matrices, by their roles in `MixerSpec`, from now on.

        No step can be made then.
        """


class _MixerClass(Protocol):
    def build(
        self, layer: int, used: Blueprint, tensors: ModelTensors, rope: RotaryEmbedding | None
    ) -> Mixer: ...


_MIXERS: dict[MixerType, _MixerClass] = {
    "attention": Attention,
    "linear_attention": GatedDeltaNet,
    "conv": ShortConv,
    "mamba": GatedDeltaNet,
    "latent_attention": LatentAttention,
}


class Block:
    """One layer, a mixer and then experts, a dense part, or both."""

    def __init__(
        self,
        mixer_norm: RMSNorm,
        mixer: Mixer,
        mlp_norm: RMSNorm,
        moe: SparseMoE | None,
        mlp: DenseMLP | None,
    ) -> None:
        self.mixer_norm, self.mixer = mixer_norm, mixer
        self.mlp_norm, self._moe, self.mlp = mlp_norm, moe, mlp

    @property
    def moe(self) -> SparseMoE:
        """Return the part with experts of a layer that has them."""
        assert self._moe is not None
        return self._moe

    @property
    def device(self) -> torch.device:
        return self.mixer_norm.weight.device

    @property
    def is_dense(self) -> bool:
        return self._moe is None

    @classmethod
    def build(
        cls,
        layer: int,
        used: Blueprint,
        tensors: ModelTensors,
        rope: RotaryEmbedding | None,
        runner: ExpertRunner,
    ) -> Block:
        config = used.config
        mixer_norm, mlp_norm = (
            RMSNorm(tensors.tensor(spec), config.rms_norm_eps) for spec in used.norms(layer)
        )
        mixer = _MIXERS[config.mixer(layer)].build(layer, used, tensors, rope)
        moe, first = None, config.first_k_dense_replace
        if layer >= first:
            moe = SparseMoE(layer - first, _router(layer, used, tensors), runner)
        parts = mixer_norm, mixer, mlp_norm, moe, _mlp(layer, used, tensors)
        if not config.sandwich_norms:
            return cls(*parts)
        norms = {
            role: RMSNorm(tensors.tensor(spec), config.rms_norm_eps)
            for role, spec in used.sandwich_norms(layer).items()
        }
        return SandwichBlock(*parts, norms, tensors.tensor(used.layer_scalar(layer)).item())

    def __call__(
        self, x: torch.Tensor, context: TokenContext, *, exact: bool = False
    ) -> torch.Tensor:
        """Map x [T, D] to [T, D]."""
        x = x + self.mixer(self.mixer_norm(x), context, exact=exact)
        normed = self.mlp_norm(x)
        outputs = [network(normed, exact=exact) for network in (self._moe, self.mlp) if network]
        # Both outputs are added first, as in transformers, since sums in bf16 depend on the order.
        return x + (outputs[0] if len(outputs) == 1 else outputs[0] + outputs[1])

    def dense_stages(self, context: SingleTokenContext) -> list[Stage]:
        """Return stages through a layer without experts."""
        x = context.x
        add = alone(rows.add_step(x, context.dense, x))
        return [*self.mixer_stages(context), *self._dense_part(context), add]

    def mixer_stages(self, context: SingleTokenContext) -> list[Stage]:
        """Return stages through the mixer, which add its output to `x`."""
        x = context.x
        return [
            self.mixer_norm.stage(x, context.normed),
            *self.mixer.stages(context),
            *in_order(context.sequences, [rows.add_step(x, context.added, x)]),
        ]

    def _dense_part(self, context: SingleTokenContext) -> list[Stage]:
        """Return stages through the norm and the dense part, if there is one."""
        norm = self.mlp_norm.stage(context.x, context.normed)
        return [norm, *(self.mlp.stages(context) if self.mlp else ())]

    def stages_up_to_experts(self, routing: Routing, context: SingleTokenContext) -> list[Stage]:
        """Return the stages after the mixer up to the experts, if some are not in memory."""
        return [*self._dense_part(context), *self._router_stages(routing, context)]

    def _router_stages(self, routing: Routing, context: SingleTokenContext) -> list[Stage]:
        """Return stages that fill `routing`, and leave the input of the experts in `normed`."""
        return self.moe.router_stages(routing, context)

    def stages_with_experts(
        self, routing: Routing, context: SingleTokenContext, experts: LayerExperts
    ) -> list[Stage]:
        """Return the stages after the mixer, if all experts are in memory.

        Threads share the work of dense part and experts, so that they meet less often.
        """
        norm, router = self.mlp_norm, self._router_stages(routing, context)
        arrange, *network, weigh = self.moe.expert_stages(routing, context, experts)
        gate: list[Stage] = []
        rounds: list[Stage] = []
        if self.mlp is not None:
            # First, because `normed` may be another part's input then.
            rounds, dense, gate = self.mlp.parts(context)
            round_x, *network = network
            network = [round_x, *beside(network, dense)]
        return [
            norm.stage(context.x, context.normed),
            *rounds,
            *beside(router, gate[:1]),
            arrange,
            *network,
            weigh,
            *gate[1:],
            *self._sum_stages(context),
        ]

    def _sum_stages(self, context: SingleTokenContext) -> list[Stage]:
        """Return the stages that add the outputs of dense part and experts to `x`."""
        x, added = context.x, context.added
        add_dense = [rows.add_step(added, context.dense, added)] if self.mlp else []
        return in_order(context.sequences, add_dense, [rows.add_step(x, added, x)])

    def run_routed(self, routing: Routing, context: SingleTokenContext) -> None:
        """Compute what is after the router by the runner of the experts."""
        added = self.moe.run_routed(routing, context)
        context.x += added + context.dense if self.mlp else added


class SandwichBlock(Block):
    """A layer with norms of its parts' outputs, and a norm of each part's input (Gemma 4).

    norms: by their roles in `Blueprint.sandwich_norms`. scalar: multiplies what the layer gives.
    """

    def __init__(
        self,
        mixer_norm: RMSNorm,
        mixer: Mixer,
        mlp_norm: RMSNorm,
        moe: SparseMoE | None,
        mlp: DenseMLP | None,
        norms: Mapping[str, RMSNorm],
        scalar: float,
    ) -> None:
        super().__init__(mixer_norm, mixer, mlp_norm, moe, mlp)
        assert mlp is not None
        self.norms, self.scalar, self._dense = norms, scalar, mlp

    def __call__(
        self, x: torch.Tensor, context: TokenContext, *, exact: bool = False
    ) -> torch.Tensor:
        norms = self.norms
        x = x + norms["mixer_out"](self.mixer(self.mixer_norm(x), context, exact=exact))
        dense = norms["mlp_out"](self._dense(self.mlp_norm(x), exact=exact))
        added = self.moe(norms["experts"](x), exact=exact, router_input=norms["router"](x))
        return self._sum(x, dense, added)

    def _sum(self, x: torch.Tensor, dense: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        """Return x with the outputs of dense part and experts."""
        norms = self.norms
        return (x + norms["layer_out"](dense + norms["experts_out"](added))) * self.scalar

    def mixer_stages(self, context: SingleTokenContext) -> list[Stage]:
        norm = self.norms["mixer_out"].stage(context.added, context.added)
        *stages, add = super().mixer_stages(context)
        return [*stages, norm, add]

    def stages_up_to_experts(self, routing: Routing, context: SingleTokenContext) -> list[Stage]:
        stages = super().stages_up_to_experts(routing, context)
        return [*stages, self.norms["mlp_out"].stage(context.dense, context.dense)]

    def _router_stages(self, routing: Routing, context: SingleTokenContext) -> list[Stage]:
        x, normed, norms = context.x, context.normed, self.norms
        stages = super()._router_stages(routing, context)
        return [norms["router"].stage(x, normed), *stages, norms["experts"].stage(x, normed)]

    def _sum_stages(self, context: SingleTokenContext) -> list[Stage]:
        x, added, norms = context.x, context.added, self.norms
        return [
            norms["mlp_out"].stage(context.dense, context.dense),
            norms["experts_out"].stage(added, added),
            alone(rows.add_step(added, context.dense, added)),
            norms["layer_out"].stage(added, added),
            alone(rows.add_step(x, added, x), rows.scale_step(x, self.scalar)),
        ]

    def run_routed(self, routing: Routing, context: SingleTokenContext) -> None:
        added = self.moe.run_routed(routing, context)
        context.x.copy_(self._sum(context.x, context.dense, added))


def _router(layer: int, used: Blueprint, tensors: ModelTensors) -> Router:
    config, specs = used.config, used.router(layer)
    bias, correction, scales = (
        tensors.tensor(specs[role]).float() if role in specs else None
        for role in ("bias", "correction", "expert_scales")
    )
    return Router(
        _gate(specs["gate"], tensors),
        config.num_experts_per_tok,
        config.norm_topk_prob,
        bias,
        config.scoring_func,
        correction,
        config.routed_scaling_factor,
        config.n_group,
        config.topk_group,
        scales,
    )


def _mlp(layer: int, used: Blueprint, tensors: ModelTensors) -> DenseMLP | None:
    spec = used.mlp_expert(layer)
    if spec is None:
        return None
    network = tensors.expert(spec)
    if not used.config.shared_expert_gate or layer < used.config.first_k_dense_replace:
        return DenseMLP(network)
    gate = _gate(used.router(layer)["mlp_gate"], tensors)
    return DenseMLP(network, Router(gate, 1, normalized=False, scoring="sigmoid"))


def _gate(spec: TensorSpec, tensors: ModelTensors) -> torch.Tensor:
    gate = tensors.tensor(spec).contiguous()
    if gpu.is_gpu(gate.device) or rows.can_compute(gate.dtype, gate.shape[1]):
        return gate
    # The router computes in fp32. Without a kernel the gate is widened once, not for each token.
    return gate.float()


class Output(NamedTuple):
    """The norm and the head, which follow the layers, and what its logits are capped by."""

    norm: RMSNorm
    head: Linear
    cap: float | None = None

    def __call__(self, x: torch.Tensor, *, exact: bool = False) -> torch.Tensor:
        """Map rows x [n, D] to logits [n, V]."""
        return self.capped(self.head(self.norm(x), exact=exact))

    def capped(self, logits: torch.Tensor) -> torch.Tensor:
        return logits if self.cap is None else rows.softcap(logits, self.cap)


class SingleTokenDecoder(Protocol):
    """Computes the next token of a sequence, or of each of several, with the same bits."""

    def run(
        self, x: torch.Tensor, context: TokenContext, after_layer: AfterLayer
    ) -> torch.Tensor | None:
        """Map the tokens' rows [N, D] to their logits [N, V].

        A decoder without norm and head returns the rows after all layers, which the next call
        overwrites. Returns None if it cannot decode in this context.
        """


class Transformer:
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
        self._embedding, self.blocks = embedding, blocks
        self.output = Output(norm, head, config.final_logit_softcapping)
        self._decoder: SingleTokenDecoder | None = None
        self._record_head: RecordRows = lambda rows: None

    @property
    def device(self) -> torch.device:
        """Return the device of the first layer."""
        return self.blocks[0].device

    def decode_by(self, decoder: SingleTokenDecoder | None) -> None:
        self._decoder = decoder

    def record_inputs(self, used: Blueprint, record: Callable[[str, torch.Tensor], object]) -> None:
        """Record the inputs [T, C] of mixers, dense parts and head, with their matrices' names.

        All tokens are recorded for the head, although it computes few.
        """
        # Its programs call kernels, and not the matrices that record.
        self._decoder = None
        for layer, block in enumerate(self.blocks):
            mixer = used.mixer(layer).matrices
            block.mixer.record_inputs({x: partial(record, mixer[x].name) for x in mixer})
            if block.mlp is not None and (matrices := used.mlp(layer)):
                block.mlp.record_inputs(*(partial(record, spec.name) for spec in matrices))
        self._record_head = lambda rows: record(HEAD, self.output.norm(rows))

    def forward(
        self,
        ids: torch.Tensor,
        context: TokenContext,
        *,
        exact: bool = False,
        logits_of: slice | list[int] = LAST,
        after_layer: AfterLayer = lambda layer: None,
    ) -> torch.Tensor:
        """Return the logits [n, V] of the last token, or of others. The ids [T] join the caches.

        The ids are on the CPU. The caches must have room for P + T tokens. With `exact` each token
        has the bits that it has alone in a call, if all matrices can be computed so.
        """
        x = self._embedding(ids)  # [T, D]
        logits = None
        sequences = len(context.caches)
        if self._decoder is not None and ids.shape[0] == sequences and (exact or sequences == 1):
            logits = self._decoder.run(x, context, after_layer)
        if logits is None:
            for layer, block in enumerate(self.blocks):
                x = block(x.to(block.device), context, exact=exact)
                after_layer(layer)
            self._record_head(x)
            # Only these rows go through the head, whose matrix is the largest dense one.
            logits = self.output(x[logits_of], exact=exact)
        # Last, so that an interrupted pass leaves the caches as they were.
        context.advance(ids.shape[0])
        return logits
