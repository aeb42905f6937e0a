"""The description of a whole layer: a mixer, and then experts, a dense part, or both.

D = hidden_size, E = num_local_experts, K = num_experts_per_tok.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mixchat.base import gpu
from mixchat.base.model_config import MixerType
from mixchat.base.safetensors import TensorSpec
from mixchat.engine.layers.attention import attention
from mixchat.engine.layers.latents import latent_attention
from mixchat.engine.layers.model_tensors import LayerTensors, ModelTensors
from mixchat.engine.layers.operations import Apply, Experts, Norm, Operation, Product, Route, Rows
from mixchat.engine.layers.rope import RotaryEmbedding
from mixchat.engine.layers.states import delta_net, short_convolution
from mixchat.experts.cache import ExpertKey
from mixchat.experts.holder import ExpertRunner
from mixchat.kernels.cpu import rows
from mixchat.kernels.cpu.router import Router
from mixchat.kernels.cpu.rows import Addition, Scaling, Weighting
from mixchat.weights.format.blueprint import Blueprint

_MIXERS: dict[MixerType, Callable[[LayerTensors, Rows, Rows], list[Operation]]] = {
    "attention": attention,
    "linear_attention": delta_net,
    "conv": short_convolution,
    "mamba": delta_net,
    "latent_attention": latent_attention,
}


@dataclass(frozen=True)
class Block:
    """A layer as a list of operations, from "x" [T, D] to "x".

    experts_index: of the operation `Experts` in the list, None in a layer without. Dense layers
    come before those with experts.
    """

    operations: Sequence[Operation]
    device: torch.device
    experts_index: int | None

    @property
    def is_dense(self) -> bool:
        return self.experts_index is None

    @property
    def experts(self) -> Experts:
        """Return the operation of a layer that has experts."""
        assert self.experts_index is not None
        operation = self.operations[self.experts_index]
        assert isinstance(operation, Experts)
        return operation

    @property
    def route(self) -> Route:
        """Return the choice of the experts."""
        return next(
            operation
            for operation in self.operations
            if isinstance(operation, Route) and operation.selected == self.experts.selected
        )

    @property
    def keys(self) -> list[ExpertKey]:
        count = self.route.router.gate.shape[0]
        return [ExpertKey(self.experts.layer, expert) for expert in range(count)]


def describe(
    number: int,
    used: Blueprint,
    tensors: ModelTensors,
    rope: RotaryEmbedding | None,
    runner: ExpertRunner,
) -> Block:
    """Describe layer `number` of a model."""
    layer = LayerTensors(number, used, tensors, rope)
    config = used.config
    x, normed, added, dense = (hidden(name, used) for name in ("x", "normed", "added", "dense"))
    before_mixer, before_mlp = map(layer.norm, used.norms(number))
    mixer = _MIXERS[config.mixer(number)](layer, normed, added)
    mlp = _dense_part(layer, normed, dense)
    experts: list[Operation] = []
    if number >= config.first_k_dense_replace:
        experts = _experts(layer, runner, normed, added)
    operations: list[Operation] = [Norm(normed, x, before_mixer), *mixer]
    if config.sandwich_norms:
        # Gemma 4 has norms of its parts' outputs, too, and a norm of each part's input.
        norms = {role: layer.norm(spec) for role, spec in used.sandwich_norms(number).items()}
        route, run = experts
        operations += [
            Norm(added, added, norms["mixer_out"]),
            _add(x, added),
            Norm(normed, x, before_mlp),
            *mlp,
            Norm(dense, dense, norms["mlp_out"]),
            Norm(normed, x, norms["router"]),
            route,
            Norm(normed, x, norms["experts"]),
            run,
            Norm(added, added, norms["experts_out"]),
            _add(added, dense),
            Norm(added, added, norms["layer_out"]),
            _add(x, added),
            Apply(x, (x,), Scaling(tensors.tensor(used.layer_scalar(number)).item())),
        ]
    else:
        operations += [
            _add(x, added),
            Norm(normed, x, before_mlp),
            *mlp,
            *experts,
        ]
        if mlp and experts:
            # Both outputs are added first, as in transformers: sums in bf16 depend on the order.
            operations.append(_add(added, dense))
        operations.append(_add(x, added if experts else dense))
    indices = (n for n, each in enumerate(operations) if isinstance(each, Experts))
    return Block(operations, before_mixer.weight.device, next(indices, None))


def _add(x: Rows, addend: Rows) -> Apply:
    """Add rows to x."""
    return Apply(x, (x, addend), Addition())


def hidden(name: str, used: Blueprint) -> Rows:
    """Return a buffer of hidden states [T, D]."""
    return Rows.new(name, used.config.hidden_size)


def _experts(layer: LayerTensors, runner: ExpertRunner, x: Rows, out: Rows) -> list[Operation]:
    """Describe a layer's router and experts, from x [T, D] to `out` [T, D]."""
    config = layer.config
    specs = layer.used.router(layer.number)
    bias, correction, scales = (
        layer.model.tensor(specs[role]).float() if role in specs else None
        for role in ("bias", "correction", "expert_scales")
    )
    router = Router(
        _gate(specs["gate"], layer.model),
        config.num_experts_per_tok,
        config.norm_topk_prob,
        bias,
        config.scoring_func,
        correction,
        config.routed_scaling_factor,
        config.n_group,
        config.topk_group,
        scales,
        config.router_logit_softcapping,
    )
    number = layer.number - config.first_k_dense_replace
    # A name for each layer, because the host reads the choices of all of them.
    selected = Rows.new(f"selected in layer {layer.number}", router.choices, dtype=torch.int64)
    weights = Rows.new("weights", router.choices, dtype=torch.float32)
    return [Route(weights, x, router, selected), Experts(out, x, selected, weights, number, runner)]


def _dense_part(layer: LayerTensors, x: Rows, out: Rows) -> list[Operation]:
    """Describe the network that every token goes through, from x to `out` [T, D], if there is one.

    A gate, a router to one expert, may multiply its output.
    """
    spec = layer.used.mlp_expert(layer.number)
    if spec is None:
        return []
    network = layer.model.expert(spec)
    config = layer.config
    gate_up = Rows.new("dense gate and up", spec.gate_up.rows)
    activated = Rows.new("dense activated", spec.down.columns)
    has_gate = config.shared_expert_gate and layer.number >= config.first_k_dense_replace
    result = Rows.new("ungated", config.hidden_size) if has_gate else out
    operations: list[Operation] = [
        Product(gate_up, x, network.gate_up, spec.gate_up.name),
        Apply(activated, (gate_up,), network.swiglu, is_wide=True),
        Product(result, activated, network.down, spec.down.name),
    ]
    if not has_gate:
        return operations
    gate = _gate(layer.used.router(layer.number)["mlp_gate"], layer.model)
    router = Router(gate, 1, normalized=False, scoring="sigmoid")
    weight = Rows.new("weight of dense part", 1, dtype=torch.float32)
    selected = Rows.new("selected dense part", 1, dtype=torch.int64)
    return [
        Route(weight, x, router, selected),
        *operations,
        Apply(out, (result, weight), Weighting()),
    ]


def _gate(spec: TensorSpec, tensors: ModelTensors) -> torch.Tensor:
    gate = tensors.tensor(spec).contiguous()
    if gpu.is_gpu(gate.device) or rows.can_compute(gate.dtype, gate.shape[1]):
        return gate
    # The router computes in fp32. Without a kernel the gate is widened once, not for each token.
    return gate.float()
