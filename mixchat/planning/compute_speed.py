"""Measures how fast a CPU computes experts and layers.

All speeds are means of a few repetitions. A median hides that other programs take the cores now and
then, and promised 2.9 times the real speed. Counts of threads are compared by their fastest
repetition, because the chosen count is kept after other programs have ended.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import mean

import torch

from mixchat.base.safetensors import TensorSpec
from mixchat.engine.caches.sequence_cache import new_caches
from mixchat.engine.decoder import new_decoder
from mixchat.engine.layers.block import Block, describe
from mixchat.engine.layers.compute import compute_layer
from mixchat.engine.layers.rope import rotary_embeddings
from mixchat.experts.cache import ExpertKey
from mixchat.experts.compute import RowExperts
from mixchat.experts.holder import LayerExperts
from mixchat.experts.memory import CPU
from mixchat.kernels.cpu import rows
from mixchat.planning.machine_speeds import interpolate
from mixchat.weights.format.blueprint import Blueprint
from mixchat.weights.format.expert import Expert, ExpertSpec
from mixchat.weights.matrix.linear import LinearSpec
from mixchat.weights.matrix.on_device import build_linear, build_parts
from mixchat.weights.matrix.quant_type import Linear

ROWS = (1, 8, 64, 512)
# If each byte has this value, codes, scales and weights are ordinary numbers. Denormal ones would
# slow the arithmetic.
_FILLING = 0x3C
_CONTEXT = 128  # tokens before the one that a layer computes
# Layers that are computed in turn, so that no CPU cache holds one. Every fourth or sixth may have
# another form.
_COPIES = 4
_MIXED_COPIES = 8


@dataclass(frozen=True)
class Effort:
    """The amounts to measure. A measurement that begins after `until` is a single try."""

    file_bytes: int = 512_000_000  # of the file to read if no model is there
    pool_bytes: int = 256_000_000  # of experts, so that no CPU cache holds them
    seconds: float = 0.3  # of a measurement, at least; some take many times as long
    until: float = math.inf  # when to end, by `time.perf_counter`

    @property
    def is_over(self) -> bool:
        return time.perf_counter() >= self.until


_THREADS_EFFORT = Effort(seconds=0.1)
_MAX_THREADS_S = 10.0  # to measure counts of threads


def thread_seconds(
    blueprint: Blueprint, counts: Sequence[int], effort: Effort = _THREADS_EFFORT
) -> dict[int, float]:
    """Return the least seconds of one token in a few layers, of two rounds, by count of threads.

    On a busy machine there may be one round.
    """
    effort = replace(effort, until=time.perf_counter() + _MAX_THREADS_S)
    previous = torch.get_num_threads()
    seconds = dict.fromkeys(counts, math.inf)
    # One token through a few layers, with experts in memory.
    choices = blueprint.config.num_experts_per_tok
    pool = _filled_experts(blueprint, effort)
    numbers = range(min(_COPIES, blueprint.config.num_moe_layers))
    layers = _Layers(blueprint, [(n, _PoolRunner(pool, n * choices)) for n in numbers])
    try:
        for count in [*counts, *counts]:  # a machine's pace may change
            if effort.is_over and seconds[count] < math.inf:
                break
            torch.set_num_threads(count)  # first, because steps are made for a count
            compute = layers.computing(layers.blocks)
            seconds[count] = min(seconds[count], *samples_of(compute, effort))
    finally:
        torch.set_num_threads(previous)
    return seconds


def samples_of(run: Callable[[], object], effort: Effort) -> list[float]:
    """Return the seconds of each call of `run` but the first."""
    samples: list[float] = []
    spent = 0.0
    least = effort.seconds
    most = 3 * effort.seconds
    _seconds_of(run)  # compiles kernels, and brings memory into the caches
    while spent < least or (len(samples) < 5 and spent < most):
        if samples and effort.is_over:
            break
        samples.append(_seconds_of(run))
        spent += samples[-1]
    return samples


def _seconds_of(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class ExpertTimer:
    """Computes experts in turn, and measures the time."""

    def __init__(self, blueprint: Blueprint, effort: Effort) -> None:
        self._turns = itertools.cycle(_filled_experts(blueprint, effort))
        config = blueprint.config
        self._are_alike = len(blueprint.expert_forms) == 1
        self._choices = config.num_experts_per_tok
        self._columns = config.hidden_size
        self._dtype = blueprint.quantization.dtype
        self._effort = effort
        matrices = (blueprint.expert.gate_up, blueprint.expert.down)
        self._weights = sum(matrix.rows * matrix.columns for matrix in matrices)
        self._one_row = self._rows(1)

    def compute_next(self) -> None:
        """Compute one expert for one row."""
        next(self._turns)(self._one_row)

    def seconds(self) -> dict[int, float]:
        """Return the seconds of an expert by count of rows, without counts that take too long."""
        seconds: dict[int, float] = {}
        for count in ROWS:
            slow = len(seconds) > 1 and interpolate(seconds, count) > 10 * self._effort.seconds
            if slow or (len(seconds) > 1 and self._effort.is_over):
                break
            seconds[count] = self._seconds_for(self._rows(count))
        return seconds

    def operations_rate(self, *, exact: bool = False) -> float:
        """Return the operations a second of a long prompt's expert. exact: as for `Linear`."""
        x = self._rows(ROWS[-1])
        operations = 2 * len(x) * self._weights
        return operations / self.mean_of(lambda: next(self._turns)(x, exact=exact))

    def _rows(self, count: int) -> torch.Tensor:
        numbers = torch.linspace(-1, 1, count * self._columns)
        return numbers.view(count, self._columns).to(self._dtype)

    def _seconds_for(self, x: torch.Tensor) -> float:
        first = next(self._turns)
        count = self._choices
        if x.shape[0] == 1 and self._are_alike and first.has_stages(x):
            # This computes an expert as for a token.
            program = RowExperts(first, x, count, count)
            numbers = torch.arange(count)

            def compute() -> None:
                experts = LayerExperts(itertools.islice(self._turns, count))
                program(x, experts.addresses, numbers, torch.zeros_like(numbers))

            return self.mean_of(compute) / count
        return self.mean_of(lambda: next(self._turns)(x))

    def mean_of(self, run: Callable[[], object]) -> float:
        """Return the mean seconds of a call of `run`, without the first call."""
        return mean(samples_of(run, self._effort))


def _filled_experts(blueprint: Blueprint, effort: Effort) -> list[Expert]:
    """Return experts of all layers, which take at least the bytes of the pool."""
    size = blueprint.expert.stride
    layers = blueprint.config.num_moe_layers
    count = max(2, -(-effort.pool_bytes // size))
    if len(blueprint.expert_forms) > 1:
        count = max(count, layers)
    blocks = torch.full((count, size), _FILLING, dtype=torch.uint8)
    forms = map(blueprint.expert_of, itertools.cycle(range(layers)))
    return [form.build(block) for form, block in zip(forms, blocks, strict=False)]


def layer_probe(blueprint: Blueprint) -> Callable[[], None]:
    """Return a function that computes one token through the next layer, without experts.

    Layers of several forms alternate.
    """
    copies = _COPIES if len(blueprint.layer_forms) == 1 else _MIXED_COPIES
    numbers = range(min(copies, blueprint.config.num_moe_layers))
    layers = _Layers(blueprint, [(number, _PoolRunner()) for number in numbers])
    turns = itertools.cycle([layers.computing([block]) for block in layers.blocks])
    return lambda: next(turns)()


class _Layers:
    """Layers for the given runners, each with its number, and a cache that is half full."""

    def __init__(self, blueprint: Blueprint, runners: Sequence[tuple[int, _PoolRunner]]) -> None:
        config = blueprint.config
        dtype = blueprint.quantization.dtype
        self._blueprint = blueprint
        tensors = FilledTensors(CPU)
        ropes = rotary_embeddings(config, 2 * _CONTEXT, dtype, CPU)
        dense = config.first_k_dense_replace
        runners = [(dense + number, runner) for number, runner in runners]
        self.blocks = [
            describe(layer, blueprint, tensors, ropes[layer], runner) for layer, runner in runners
        ]
        [self._cache] = new_caches(config, 2 * _CONTEXT, dtype, [CPU] * config.num_hidden_layers)
        self._cache.fill(_CONTEXT, dtype)
        self._x = torch.ones(1, config.hidden_size, dtype=dtype)

    def computing(self, blocks: Sequence[Block]) -> Callable[[], None]:
        """Return a function that computes one token through these blocks."""
        decoder = new_decoder(blocks, self._cache, self._blueprint)

        @torch.inference_mode()
        def compute() -> None:
            x = self._x
            if decoder is None or decoder.run(x, self._cache, lambda layer: None) is None:
                for block in blocks:
                    x = compute_layer(block.operations, x, self._cache)

        return compute


class _PoolRunner:
    """An `ExpertRunner` with experts of a pool, from one number on, or without any."""

    def __init__(self, pool: Sequence[Expert] = (), start: int = 0) -> None:
        self._pool = pool
        self._start = start
        self._held = functools.cache(lambda count: LayerExperts(map(self._expert, range(count))))

    def run(
        self,
        layer: int,
        hidden_states: torch.Tensor,
        selected_experts: torch.Tensor,
        routing_weights: torch.Tensor,
        *,
        exact: bool = False,
    ) -> torch.Tensor:
        selected = selected_experts[0].tolist()  # as every runner does
        if not self._pool:
            return hidden_states
        outputs = [self._expert(expert)(hidden_states) for expert in selected]
        return rows.weighted_sum(torch.stack(outputs, dim=1), routing_weights)

    def resident(self, layers: Sequence[Sequence[ExpertKey]]) -> Sequence[LayerExperts]:
        return [self._held(len(keys)) for keys in layers if self._pool]

    def note_hits(self, layer: int, selected: Sequence[Sequence[int]]) -> None: ...

    def _expert(self, number: int) -> Expert:
        return self._pool[(self._start + number) % len(self._pool)]


class FilledTensors:
    """Tensors with `_FILLING` in each byte."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def tensor(self, spec: TensorSpec) -> torch.Tensor:
        filled = torch.full((spec.nbytes,), _FILLING, dtype=torch.uint8, device=self._device)
        return filled.view(spec.dtype).view(spec.shape)

    def linear(self, spec: LinearSpec) -> Linear:
        tensors = [self.tensor(tensor) for tensor in spec.tensors]
        return build_linear(spec, tensors)

    def parts(self, spec: LinearSpec, count: int) -> list[Linear]:
        return build_parts(spec, [self.tensor(tensor) for tensor in spec.tensors], count)

    def expert(self, spec: ExpertSpec) -> Expert:
        return Expert(self.linear(spec.gate_up), self.linear(spec.down), spec.swiglu)
