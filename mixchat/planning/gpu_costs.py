"""Estimates the seconds that a token or a prompt takes on GPUs, and on their host meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mixchat.base.model_config import MixerType
from mixchat.engine.caches.sequence_cache import bytes_seen
from mixchat.kernels.cpu.pages import Bits
from mixchat.planning.machine_speeds import GPUSpeeds
from mixchat.weights.format.blueprint import Blueprint
from mixchat.weights.matrix.linear import LinearSpec

# Kernels of a layer's graph, by `tests/benchmarks/gpu_budget.py`: of each mixer and its norm, of
# experts with their norm and router, of a dense part, and of norms of outputs. Attention to many
# keys is split, and one more kernel merges the splits. Mamba2 has no graph.
_MIXER_KERNELS: dict[MixerType, int] = {
    "attention": 6,
    "latent_attention": 8,
    "linear_attention": 4,
    "conv": 4,
    "mamba": 6,
}
_QUERY_LATENT_KERNELS = 2
_EXPERT_KERNELS = 4
_DENSE_KERNELS = 2
_OUTPUT_NORM_KERNELS = 6
_LAST_KERNELS = 4  # the last norm, the head, and two copies to the host
_HOST_KERNELS = 4  # more in a layer that waits for the host: three copies, and a row of zeros
# Seconds of the host, measured on an AMD EPYC. A GPU rests while it samples a token of 152,000 by
# default options, and while Python looks for a layer's missing experts and hands each to the
# CPU. It rests, too, if Python starts a prompt's layers and their experts more slowly than it
# computes them.
TOKEN_S = 5e-4
MISSING_LAYER_S = 8e-5
MISSING_EXPERT_S = 1.7e-5
PROMPT_LAYER_S = 2.4e-4
PROMPT_EXPERT_S = 1.35e-4


@dataclass(frozen=True)
class GPUCosts:
    """The costs of a model on GPUs with these speeds, which compute one after the other."""

    blueprint: Blueprint
    speeds: GPUSpeeds

    def token(self, hit_rate: float, hops: int, context: int, bits: Bits | None) -> float:
        """Return the seconds of a token, without the seconds of missing experts.

        hops: GPUs that compute. context: tokens before this one, with keys and values of `bits`.
        """
        config = self.blueprint.config
        speeds = self.speeds
        experts = hit_rate * config.num_experts_per_tok
        products = sum(map(speeds.product_time, self._dense)) + experts * self._expert_times
        dtype = self.blueprint.quantization.dtype
        size = self._head_bytes + bytes_seen(config, context, dtype, bits)
        kernels = self.kernels
        if hit_rate < 1:
            kernels += _HOST_KERNELS * config.num_moe_layers
        waits = hops * speeds.round_trip + TOKEN_S
        return products + size / speeds.memory + kernels * speeds.kernel + waits

    def missing(self, misses: float) -> float:
        """Return the seconds that a token's missing experts take in addition to their products."""
        layer = self.speeds.round_trip + MISSING_LAYER_S
        return self.blueprint.config.num_moe_layers * layer + misses * MISSING_EXPERT_S

    @property
    def kernels(self) -> int:
        """Return the kernels of a token, if GPUs hold all experts."""
        return _LAST_KERNELS + sum(map(self._kernels_of, range(self._layers)))

    def chunk(self, tokens: int, distinct: float) -> float:
        """Return the seconds of a chunk of a prompt that uses `distinct` experts of each layer.

        Weights become 16-bit numbers once for a chunk, and tensor cores multiply them. The host
        starts all that, expert by expert, and takes longer for small experts.
        """
        config = self.blueprint.config
        speeds = self.speeds
        expert = self.blueprint.expert
        uses = config.num_moe_layers * distinct
        rows = tokens * config.num_experts_per_tok / distinct
        seconds = sum(map(speeds.product_time, self._dense)) + distinct * self._expert_times
        experts = uses * _weights([expert.gate_up, expert.down])
        for weights, each in ((_weights(self._dense), tokens), (experts, rows)):
            written = 2 * weights / speeds.memory
            seconds += written + max(written, 2 * weights * each / speeds.compute)
        return max(seconds, self._layers * PROMPT_LAYER_S + uses * PROMPT_EXPERT_S)

    @property
    def _head_bytes(self) -> int:
        return (self.blueprint.head or self.blueprint.embedding).nbytes

    @property
    def _layers(self) -> int:
        return self.blueprint.config.num_hidden_layers

    @property
    def _expert_times(self) -> float:
        """Return the seconds of an expert of each layer, added up."""
        layers = map(self.blueprint.expert_of, range(self.blueprint.config.num_moe_layers))
        time = self.speeds.product_time
        return sum(time(expert.gate_up) + time(expert.down) for expert in layers)

    @property
    def _dense(self) -> list[LinearSpec]:
        layers = range(self._layers)
        return [matrix for layer in layers for matrix in self.blueprint.dense_matrices(layer)]

    def _kernels_of(self, layer: int) -> int:
        config = self.blueprint.config
        mixer = config.mixer(layer)
        count = _MIXER_KERNELS[mixer]
        if mixer == "latent_attention" and config.q_lora_rank:
            count += _QUERY_LATENT_KERNELS
        if mixer == "attention":
            count += config.attn_head_gate
        if layer >= config.first_k_dense_replace:
            count += _EXPERT_KERNELS
        if config.mlp_intermediate_size(layer):
            count += _DENSE_KERNELS + config.shared_expert_gate
        if config.sandwich_norms:
            count += _OUTPUT_NORM_KERNELS
        return count


def _weights(matrices: Sequence[LinearSpec]) -> int:
    return sum(matrix.rows * matrix.columns for matrix in matrices)
