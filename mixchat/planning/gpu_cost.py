"""Counts the seconds of a token and of a prompt on GPUs and the CPU together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from math import comb

from mixchat.base.model_config import MixerType, ModelConfig
from mixchat.planning.gpu_speeds import EFFICIENCY, KERNEL_S, SYNC_S, GPUSpeeds
from mixchat.weights.format.blueprint import Blueprint
from mixchat.weights.matrix.linear import LinearSpec

# Of a token in a layer. `tests/benchmarks/gpu_budget.py` counts them. Mamba2 has no kernels yet.
_OF_MIXERS: dict[MixerType, int] = {
    "attention": 4,
    "latent_attention": 6,
    "linear_attention": 3,
    "conv": 3,
    "mamba": 3,
}
_OF_LATENT_QUERIES, _OF_SANDWICH_NORMS, _OF_NORMS, _OF_ROUTER, _OF_EXPERTS = 2, 6, 2, 1, 2


def token_kernels(config: ModelConfig) -> int:
    """Return the kernels of the layers for a token whose experts are all in VRAM."""
    parts = [
        _OF_NORMS + _OF_MIXERS[config.mixer(layer)] for layer in range(config.num_hidden_layers)
    ]
    of_layer = _OF_EXPERTS + (_OF_LATENT_QUERIES if config.q_lora_rank else 0)
    of_moe = _OF_ROUTER + (_OF_SANDWICH_NORMS if config.sandwich_norms else 0)
    if config.shared_expert_intermediate_size:
        of_moe += _OF_EXPERTS + (_OF_ROUTER if config.shared_expert_gate else 0)
    return sum(parts) + len(parts) * of_layer + config.num_moe_layers * of_moe


class GPUWork:
    """The work of a model on GPUs. `shares` has the layers that each holds, or its slots.

    The GPUs hold whole layers, and a token passes one after the other. A row of 4 to 8 KB goes from
    one to the next, in 20 us with the start of the copy. If each held some experts of every layer,
    all would read at the same time, but every layer would need a round trip of 20 to 40 us. By
    arithmetic for two RTX 3090 in 4 bits, a token of Mixtral (10.8 ms) would take 9.2 to 9.8 ms,
    and a token of Qwen3-30B (3.8 ms) 4.3 to 5.3 ms. Layers apart also take cards that differ.
    """

    def __init__(
        self, blueprint: Blueprint, gpus: Sequence[GPUSpeeds], shares: Sequence[int] = (1,)
    ) -> None:
        self._blueprint, self._config = blueprint, blueprint.config
        used = [(gpus[min(n, len(gpus) - 1)], count) for n, count in enumerate(shares) if count]
        self._shares = [(gpu, count / sum(shares)) for gpu, count in used]  # 0 to 1

    def token(self, hit_rate: float, uses: float, cpu_expert_s: float) -> tuple[float, float]:
        """Return the seconds of a token of the GPUs, and that they wait for the CPU's experts.

        Each layer uses `uses` experts. The GPUs compute the part `hit_rate` of them. At the same
        time the CPU computes the others, `cpu_expert_s` seconds each. A layer takes the longer of
        both, and a wait for the other.
        """
        layers = self._config.num_moe_layers
        computing = waiting = 0.0
        for gpu, share in self._shares:
            # Of one row, the mean of all layers.
            expert_s = sum(map(gpu.reading, self._experts)) / len(self._experts)
            computing += share * (gpu.reading(self._dense) + layers * hit_rate * uses * expert_s)
            computing += share * token_kernels(self._config) * KERNEL_S
            if hit_rate < 1:  # one more kernel adds what the CPU computed
                computing += share * layers * (KERNEL_S + SYNC_S)
                waiting += share * layers * _waiting(hit_rate, round(uses), expert_s, cpu_expert_s)
        hops = (len(self._shares) - 1) * SYNC_S
        return computing + hops + self.head(), waiting

    def chunk(self, tokens: int, distinct: float) -> float:
        """Return the seconds of a chunk of a prompt, without the head.

        `distinct` experts of each layer are used.
        """
        rows = tokens * self._config.num_experts_per_tok / distinct
        seconds = 0.0
        for gpu, share in self._shares:
            layers = [gpu.multiplying(matrices, rows) for matrices in self._experts]
            experts_s = sum(layers) / len(layers) * self._config.num_moe_layers * distinct
            seconds += share * (gpu.multiplying(self._dense, tokens) + experts_s)
        return seconds

    def head(self) -> float:
        """Return the seconds of the logits of one token."""
        last, _ = self._shares[-1]
        embedding_s = self._blueprint.embedding.nbytes / (last.memory * EFFICIENCY["none"])
        return (last.reading(self._heads) if self._heads else embedding_s) + SYNC_S

    @property
    def bytes_per_token(self) -> int:
        """Return the bytes of weights that a token reads if all experts are in VRAM."""
        config = self._config
        experts = config.num_moe_layers * config.num_experts_per_tok * self._blueprint.mean_expert
        dense = sum(matrix.nbytes for matrix in (*self._dense, *self._heads))
        return experts + dense + (0 if self._heads else self._blueprint.embedding.nbytes)

    @cached_property
    def _heads(self) -> list[LinearSpec]:
        return [] if self._blueprint.head is None else [self._blueprint.head]

    @cached_property
    def _dense(self) -> list[LinearSpec]:
        layers = range(self._config.num_hidden_layers)
        return [matrix for layer in layers for matrix in self._blueprint.dense_matrices(layer)]

    @cached_property
    def _experts(self) -> list[tuple[LinearSpec, LinearSpec]]:
        """Return w13 and w2 of each layer's experts, or once if all are alike."""
        layers = range(self._config.num_moe_layers if self._blueprint.layers else 1)
        specs = map(self._blueprint.expert_of, layers)
        return [(spec.gate_up, spec.down) for spec in specs]


def _waiting(hit_rate: float, uses: int, gpu_expert_s: float, cpu_expert_s: float) -> float:
    """Return the seconds that a layer's experts take longer than the GPU computes its own.

    Each of `uses` experts is in VRAM by chance. The mean of both times would hide that a layer
    waits for a single miss: with 2 experts, 90% hits, .2 ms on the GPU and 3 ms on the CPU, a layer
    takes .38 ms in 81 of 100 tokens, but 3 ms in 18 and 6 ms in 1.
    """
    longest = sum(
        comb(uses, misses)
        * (1 - hit_rate) ** misses
        * hit_rate ** (uses - misses)
        * max((uses - misses) * gpu_expert_s, misses * cpu_expert_s)
        for misses in range(uses + 1)
    )
    return longest - hit_rate * uses * gpu_expert_s
