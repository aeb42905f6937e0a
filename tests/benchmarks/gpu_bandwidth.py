"""Measures how fast kernels read weights, keys and values on a GPU, for tests/gpu.sh.

Each kernel runs in a graph, with more memory than the card's cache holds, so that it reads memory.

K = chosen experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from paper_tools import TINY
from torch.nn import functional

from mixchat.base import gpu
from mixchat.install.known_models import KNOWN
from mixchat.kernels.gpu.attention import Parts, attend
from mixchat.kernels.gpu.experts import experts_down, experts_up
from mixchat.kernels.gpu.kv_store import KVTensors
from mixchat.kernels.gpu.product import product, split
from mixchat.planning.bandwidth import memory_rate, seconds_of
from mixchat.weights.families.read_config import read_config
from mixchat.weights.format.blueprint import Blueprint, Quantization
from mixchat.weights.format.gpu_expert import expert_form
from mixchat.weights.matrix.gpu_linear import build_on_gpu
from mixchat.weights.matrix.linear import TYPES, LinearSpec

_SHAPES = ("instruct", "qwen3", "gpt-oss")
_POOL_BYTES = 2**28  # that a graph reads at least
_CACHES = 4  # of the card, that it reads at least
_CONTEXT = 8192  # tokens
_TRIES = 20
_GB = 10**9


def print_rates(device: torch.device, *, tiny: bool) -> list[str]:
    """Print GB/s of each shape, type and kernel, and the part of a copy's. Return what failed."""
    memory, failures = memory_rate(device), []
    print(f"copies within the card: {memory / _GB:.0f} GB/s")
    configs = {"tiny": TINY} if tiny else {shape: KNOWN[shape].config for shape in _SHAPES}
    bench = _Bench(device, tiny)
    for shape, config in configs.items():
        for name, quant_type in TYPES.items():
            dense = "nf4" if name == "mxfp4" else name  # which is for experts alone
            form = Quantization(name if quant_type.for_experts else "nf4", dense, dense)
            blueprint, rates = Blueprint(read_config(config), form), []
            for kernel, measure in bench.measurements(blueprint, quant_type.for_experts):
                try:
                    rate = measure()
                except Exception as error:  # the other kernels are measured nevertheless
                    failures.append(f"{shape} {name} {kernel}: {error!r:.300}")
                    rates.append(f"{kernel} failed")
                else:
                    rates.append(f"{kernel} {rate / _GB:.1f} ({rate / memory:.0%})")
            print(f"{shape} {name}: {', '.join(rates)} GB/s")
    return failures


def nf4_seconds(device: torch.device, rows: int, columns: int, *, tiny: bool) -> float:
    """Return the seconds of a product of one row with a matrix in nf4."""
    spec = LinearSpec("matrix", rows, columns, "nf4", torch.bfloat16)
    return _nbytes(spec) / _Bench(device, tiny).product_rate(spec)


def beside_sdpa(device: torch.device, tokens: int, *, tiny: bool) -> tuple[float, float]:
    """Return the seconds of a token's attention to so many keys, and of torch's SDPA, in Qwen3."""
    config = read_config(TINY if tiny else KNOWN["qwen3"].config)
    bench = _Bench(device, tiny, tokens)
    heads, groups, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    size = 4 * groups * tokens * width
    ours = size / bench.attention_rate(Blueprint(config, Quantization("none")), 16)
    dtype = torch.bfloat16
    query = torch.ones(1, heads, 1, width, dtype=dtype, device=device)
    caches = [
        torch.ones(2, 1, groups, tokens, width, dtype=dtype, device=device)
        for _ in range(bench.count(size))
    ]

    def attend_to_all() -> None:
        for keys, values in caches:
            functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    return ours, median(seconds_of(attend_to_all, device)) / len(caches)


class _Bench:
    """Measures kernels on a GPU, with little memory and once if it is for tiny shapes."""

    def __init__(self, device: torch.device, tiny: bool, context: int = _CONTEXT) -> None:
        self._device, self._tries = device, 1 if tiny else _TRIES
        self._pool = 1 if tiny else max(_POOL_BYTES, _CACHES * _cache_of(device))
        self._context = 64 if tiny else context

    def measurements(
        self, blueprint: Blueprint, of_experts: bool
    ) -> Iterator[tuple[str, Callable[[], float]]]:
        """Yield kernels' names, and functions that return the bytes a second that they read."""
        if of_experts:
            yield "up", lambda: self._experts(blueprint, is_up=True)
            yield "down", lambda: self._experts(blueprint, is_up=False)
        for role, matrix in blueprint.mixer(0).matrices.items():
            yield role, partial(self.product_rate, matrix)
        if (head := blueprint.head) is not None:
            yield "head", lambda: self.product_rate(head)
        if blueprint.quantization.quant_type == "none":  # once for a shape
            yield "attention in 16 bits", lambda: self.attention_rate(blueprint, 16)
            yield "attention in 8 bits", lambda: self.attention_rate(blueprint, 8)

    def _experts(self, blueprint: Blueprint, *, is_up: bool) -> float:
        spec, chosen = blueprint.expert_of(0), blueprint.config.num_experts_per_tok
        form, levels = expert_form(spec, self._device)
        matrix = spec.gate_up if is_up else spec.down
        calls = self.count(chosen * _nbytes(matrix))
        blocks = [self._random(spec.stride) for _ in range(calls * chosen)]
        table = torch.tensor([block.data_ptr() for block in blocks]).to(self._device)
        numbers = torch.arange(calls * chosen, dtype=torch.int32).view(calls, chosen)
        x = self._ones(spec.gate_up.columns, dtype=spec.gate_up.dtype)
        gated = self._ones(chosen, spec.down.columns, dtype=spec.down.dtype)
        weights = self._ones(chosen)
        sums = self._ones(chosen * form.split(chosen).count, spec.down.rows)

        def call(selected: torch.Tensor) -> object:
            if is_up:
                return experts_up(x, selected, table, form, levels, gated)
            return experts_down(gated, selected, weights, table, form, levels, sums)

        return self._rate(call, [*numbers.to(self._device)], chosen * _nbytes(matrix))

    def product_rate(self, spec: LinearSpec) -> float:
        spec = replace(spec, bias=False)
        matrices = []
        for _ in range(self.count(_nbytes(spec))):
            tensors = [
                self._random(each.nbytes).view(each.dtype).view(each.shape) for each in spec.tensors
            ]
            linear = build_on_gpu(spec, tensors)
            assert linear is not None
            matrices.append(linear.matrix)
        x = self._ones(1, spec.columns, dtype=spec.dtype)
        form = matrices[0].form
        out = self._ones(split(form).count, 1, form.rows)
        return self._rate(lambda matrix: product(x, matrix, out), matrices, _nbytes(spec))

    def attention_rate(self, blueprint: Blueprint, bits: int) -> float:
        """Measure one token after a long context without a window."""
        config, dtype, room = blueprint.config, blueprint.quantization.dtype, self._context
        heads, shape = config.num_attention_heads, (2, config.num_key_value_heads, room)

        def layer() -> KVTensors:
            if bits == 16:
                return KVTensors(self._ones(*shape, config.head_dim, dtype=dtype), None)
            numbers = self._ones(*shape, config.head_dim, dtype=torch.int8)
            return KVTensors(numbers, self._ones(*shape))

        size = sum(tensor.nbytes for tensor in layer() if tensor is not None)
        layers = [layer() for _ in range(self.count(size))]
        queries = self._ones(1, heads, config.head_dim, dtype=dtype)
        out, past = torch.ones_like(queries), self._ones(1, dtype=torch.int32) * (room - 1)
        parts = Parts.for_tokens(1, heads, layers[0], None)
        return self._rate(
            lambda tensors: attend(queries, tensors, past, out, parts, None, None), layers, size
        )

    def _rate(self, call: Callable[[Any], object], inputs: Sequence[Any], size: int) -> float:
        """Return the bytes a second of a graph of calls, each of which reads `size` bytes."""
        for each in inputs:
            call(each)
        with gpu.captured(self._device) as graph:
            for each in inputs:
                call(each)
        seconds = median(seconds_of(graph.replay, self._device, self._tries))
        return len(inputs) * size / seconds

    def count(self, size: int) -> int:
        """Return how many blocks of a size fill the pool."""
        return max(2, -(-self._pool // size))

    def _ones(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.ones(shape, dtype=dtype, device=self._device)

    def _random(self, size: int) -> torch.Tensor:
        return torch.randint(0, 256, (size,), dtype=torch.uint8, device=self._device)


def _cache_of(device: torch.device) -> int:
    """Return the bytes of a card's L2 cache."""
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0))


def _nbytes(spec: LinearSpec) -> int:
    return sum(tensor.nbytes for tensor in spec.tensors)
