"""Measures how fast experts and layers are computed, and experts copied.

All figures are means of a few repetitions. Medians miss it if other programs take the cores now and
then. They promised 2.9 times the speed.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import mean

import torch

from mixchat.base import gpu
from mixchat.base.safetensors import TensorSpec
from mixchat.engine.decoder import new_decoder
from mixchat.engine.kv_cache import new_cache
from mixchat.engine.model import Block
from mixchat.engine.rope import rotary_embeddings
from mixchat.experts.cache import ExpertKey
from mixchat.experts.memory import CPU
from mixchat.planning.machine_speeds import interpolate
from mixchat.weights.format.blueprint import Blueprint, Expert
from mixchat.weights.matrix.linear import LinearSpec
from mixchat.weights.matrix.quant_type import Linear

Copy = Callable[[torch.Tensor, torch.Tensor], object]  # to a block on the device, from one in RAM

ROWS = (1, 8, 64, 512)
# With this in each byte, codes, scales and weights are ordinary numbers, which slow no arithmetic.
_FILLING = 0x3C
_CONTEXT = 128  # tokens before the one that a layer computes
_COPIES = 4  # layers in turn, so that no CPU cache holds one


@dataclass(frozen=True)
class Effort:
    """The amounts to measure. A figure that is begun after `until` is the result of one try."""

    file_bytes: int = 512_000_000  # of the file to read if no model is there
    pool_bytes: int = 256_000_000  # of experts, so that no CPU cache holds them
    seconds: float = 0.25  # for a figure at least; some take many times that
    until: float = math.inf  # when to end, by `time.perf_counter`

    @property
    def is_over(self) -> bool:
        return time.perf_counter() >= self.until


SAMPLE_EFFORT = Effort(seconds=0.1)  # for one of several samples
_MAX_THREADS_S = 10.0  # to measure counts of threads


@torch.inference_mode()
def thread_seconds(
    blueprint: Blueprint, counts: Sequence[int], effort: Effort = Effort()
) -> dict[int, float]:
    """Return seconds of one expert for one row by count of threads, the best of two rounds.

    On a busy machine there may be one round.
    """
    effort = replace(effort, until=time.perf_counter() + _MAX_THREADS_S)
    before, experts = torch.get_num_threads(), ExpertTimer(blueprint, CPU, effort)
    seconds = dict.fromkeys(counts, math.inf)
    try:
        for count in [*counts, *counts]:  # a machine's pace may change
            if effort.is_over and seconds[count] < math.inf:
                break
            torch.set_num_threads(count)
            seconds[count] = min(seconds[count], experts.mean_of(experts.compute_next))
    finally:
        torch.set_num_threads(before)
    return seconds


class ExpertTimer:
    """Computes experts on a device in turn, and measures the time."""

    def __init__(self, blueprint: Blueprint, device: torch.device, effort: Effort) -> None:
        layout = blueprint.computed_on(device).expert
        count = max(2, -(-effort.pool_bytes // layout.stride))
        shape = (count, layout.stride)
        self._blocks = torch.full(shape, _FILLING, dtype=torch.uint8, device=device)
        self._turns = itertools.cycle([layout.build(block) for block in self._blocks])
        self._columns, self._dtype = layout.gate_up.columns, blueprint.quantization.dtype
        self._device, self._effort = device, effort
        self._one_row = self._rows(1)

    def compute_next(self) -> None:
        """Compute one expert for one row."""
        next(self._turns)(self._one_row)

    def seconds(self) -> dict[int, float]:
        """Return seconds of an expert by count of rows, but not for slow counts."""
        seconds: dict[int, float] = {}
        for rows in ROWS:
            slow = len(seconds) > 1 and interpolate(seconds, rows) > 10 * self._effort.seconds
            if slow or (len(seconds) > 1 and self._effort.is_over):
                break
            seconds[rows] = self._seconds_for(self._rows(rows))
        return seconds

    def copy_bandwidth(self, copy: Copy) -> float:
        """Return bytes a second from page-locked RAM."""
        source = torch.full_like(self._blocks[0], _FILLING, device=CPU)
        if gpu.is_gpu(self._device):
            gpu.page_lock(source, self._device)
        targets = itertools.cycle(self._blocks)
        return source.nbytes / self.mean_of(lambda: copy(next(targets), source))

    def _rows(self, count: int) -> torch.Tensor:
        numbers = torch.linspace(-1, 1, count * self._columns, device=self._device)
        return numbers.view(count, self._columns).to(self._dtype)

    def _seconds_for(self, x: torch.Tensor) -> float:
        # Other devices work while the next call is prepared.
        calls = 1 if self._device == CPU else len(self._blocks)

        def run() -> None:
            for _ in range(calls):
                next(self._turns)(x)

        return self.mean_of(run) / calls

    def mean_of(self, run: Callable[[], object]) -> float:
        """Return the seconds that `run` takes after the first time."""
        samples: list[float] = []
        least, most = self._effort.seconds, 3 * self._effort.seconds
        self._seconds_of(run)
        while (spent := sum(samples)) < least or (len(samples) < 5 and spent < most):
            if samples and self._effort.is_over:
                break
            samples.append(self._seconds_of(run))
        return mean(samples)

    def _seconds_of(self, run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        gpu.synchronize(self._device)
        return time.perf_counter() - start


def layer_probe(blueprint: Blueprint, device: torch.device) -> Callable[[], None]:
    """Return a function that computes one token through a layer without experts."""
    config, dtype = blueprint.config, blueprint.quantization.dtype
    used = blueprint.computed_on(device)
    rope = rotary_embeddings(config, 2 * _CONTEXT, dtype, device)[0]
    tensors, runner = _FilledTensors(device), _NoExperts()
    blocks = [Block.build(0, used, tensors, rope, runner) for _ in range(_COPIES)]
    cache = new_cache(config, 2 * _CONTEXT, dtype, device)
    turns = itertools.cycle([(block, new_decoder(used, [block], cache)) for block in blocks])
    earlier = torch.ones(_CONTEXT, config.num_key_value_heads, config.head_dim, dtype=dtype)
    queries = torch.ones(_CONTEXT, config.num_attention_heads, config.head_dim, dtype=dtype)
    cache.attend(0, queries.to(device), earlier.to(device), earlier.to(device))
    cache.length = _CONTEXT
    x = torch.ones(1, config.hidden_size, dtype=dtype, device=device)

    @torch.inference_mode()
    def compute() -> None:
        block, decoder = next(turns)
        if decoder is None or decoder.run(x, cache, lambda layer: None) is None:
            block(x, cache)

    return compute


class _NoExperts:
    """An `ExpertRunner` without experts."""

    def run(
        self,
        layer: int,
        hidden_states: torch.Tensor,
        selected_experts: torch.Tensor,
        routing_weights: torch.Tensor,
        *,
        exact: bool = False,
    ) -> torch.Tensor:
        selected_experts.tolist()  # as every runner does, which waits for a GPU
        return hidden_states

    def resident(self, layers: Sequence[Sequence[ExpertKey]]) -> Sequence[Sequence[Expert]]:
        return ()

    def note_hits(self, keys: Sequence[ExpertKey]) -> None: ...


class _FilledTensors:
    """Tensors with `_FILLING` in each byte."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def tensor(self, spec: TensorSpec) -> torch.Tensor:
        filled = torch.full((spec.nbytes,), _FILLING, dtype=torch.uint8, device=self._device)
        return filled.view(spec.dtype).view(spec.shape)

    def linear(self, spec: LinearSpec) -> Linear:
        return spec.build([self.tensor(tensor) for tensor in spec.tensors])
