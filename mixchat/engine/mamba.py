"""Mamba2 of one layer, which is computed as a gated DeltaNet is.

V = heads, D = hidden_size.
"""

from __future__ import annotations

from mixchat.engine.delta_net import GatedDeltaNet
from mixchat.engine.model_tensors import ModelTensors
from mixchat.engine.rope import RotaryEmbedding
from mixchat.kernels.cpu.convolution import Convolution
from mixchat.kernels.cpu.delta_net import DeltaNetShape, DeltaRule, GatedNorm
from mixchat.weights.format.blueprint import Blueprint


class Mamba(GatedDeltaNet):
    """A recurrent mixer. C, B and x take the places of queries, keys and values.

    ba_proj: [V, D], to dt, which decays and rates depend on.
    """

    @classmethod
    def build(
        cls, layer: int, used: Blueprint, tensors: ModelTensors, rope: RotaryEmbedding | None
    ) -> Mamba:
        spec, config = used.mixer(layer), used.config
        in_proj, out_proj = map(tensors.linear, spec.matrices.values())
        own = {role: tensors.tensor(tensor) for role, tensor in spec.tensors.items()}
        shape = DeltaNetShape(*config.mamba_shape)
        return cls(
            layer,
            in_proj,
            out_proj,
            own["dt_proj"].contiguous(),
            Convolution(own["conv1d"], own.get("conv1d_bias")),
            DeltaRule(shape, own["A_log"], own["dt_bias"], own["D"]),
            GatedNorm(own["norm"].contiguous(), config.rms_norm_eps, config.mamba_n_groups),
        )
