"""Chooses the types of experts' matrices for each layer, under a budget of bytes.

w1 and w3 are one stored matrix, so they share a type.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from mixchat.base.errors import UsageError
from mixchat.base.options import ExpertSize
from mixchat.base.quantities import format_least
from mixchat.weights.format.blueprint import Blueprint, Form, layers_unlike
from mixchat.weights.matrix.linear import TYPES, LinearSpec, type_of_bits
from mixchat.weights.matrix.quant_type import QuantType

_SAMPLE_SHAPE = (64, 4096)


class Sensitivity(NamedTuple):
    """The cost of a layer's noise, for each unit of squared relative error of its products.

    `up` is for w1 and w3 of its experts, `down` for w2.
    """

    up: float
    down: float


class _Candidate(NamedTuple):
    """A form of a layer's experts, with its bytes and its cost."""

    size: int
    cost: float
    form: Form


def choose_mix(
    blueprint: Blueprint, sensitivities: Sequence[Sensitivity], budget: int
) -> Blueprint:
    """Return the model with the types that lose least while all experts take `budget` bytes.

    The loss counts as the sum, over layers and matrices, of the sensitivity times the type's
    squared error (as in HIGGS, Malinovskii et al., arXiv:2411.17525). All layers start with the
    smallest types. The step that saves most loss for each of its bytes comes next, along the lower
    convex hull of each layer's forms, while the budget allows it. Raises `UsageError` if not even
    the smallest types fit.
    """
    count = blueprint.config.num_local_experts
    sizes = _sizes(blueprint)
    options = [[*_options(sizes, each)] for each in sensitivities]
    chosen = [min(own) for own in options]
    remaining = budget - count * sum(option.size for option in chosen)
    if remaining < 0:
        raise UsageError(
            f"--expert-bits: the experts take at least {format_least(budget - remaining)}, and the "
            f"budget leaves {format_least(max(budget, 0))} for them",
            hint="Ask for more bits, or for more memory.",
        )
    steps = sorted(
        (-rate, layer, option) for layer, own in enumerate(options) for rate, option in _steps(own)
    )
    full = set()
    for _, layer, option in steps:
        added = count * (option.size - chosen[layer].size)
        if layer in full or added > remaining:
            full.add(layer)
            continue
        chosen[layer], remaining = option, remaining - added
    return mixed(blueprint, [option.form for option in chosen])


def mixed(blueprint: Blueprint, forms: Sequence[Form]) -> Blueprint:
    """Return the model with these forms of its layers' experts.

    The type that w1 and w3 have in most layers is the model's.
    """
    types = [up for up, _ in forms]
    shared = replace(blueprint.quantization, quant_type=max(types, key=types.count), down=None)
    layers = [replace(shared, quant_type=up, down=down) for up, down in forms]
    return replace(blueprint, quantization=shared, layers=layers_unlike(shared, layers))


def budget_of(blueprint: Blueprint, bits: float) -> int:
    """Return the bytes of all experts with so many bits a weight, with scales."""
    matrices = blueprint.expert.gate_up, blueprint.expert.down
    weights = sum(matrix.rows * matrix.columns for matrix in matrices)
    return int(bits / 8 * weights * blueprint.expert_count)


def bits_of(blueprint: Blueprint) -> float:
    """Return the bits of a weight of the experts, with scales, on average."""
    return 8 * blueprint.experts_size / budget_of(blueprint, 8)


def equal_sensitivities(blueprint: Blueprint) -> list[Sensitivity]:
    """Return equal sensitivities, for a plan before they are measured."""
    return [Sensitivity(1.0, 1.0)] * blueprint.config.num_moe_layers


def is_for_calibration(bits: ExpertSize) -> bool:
    """Return whether a download makes these bits by calibrating a model in 4 bits."""
    return bits.whole is None or TYPES[type_of_bits(bits.whole)].needs_calibration


def forms_of(blueprint: Blueprint) -> list[Form]:
    """Return the types of each layer's experts."""
    layers = blueprint.layers or [blueprint.quantization] * blueprint.config.num_moe_layers
    return [(form.quant_type, form.down) for form in layers]


def summary(blueprint: Blueprint) -> str:
    """Return a sentence with the number of layers for each type of a matrix."""
    layers = range(blueprint.config.num_moe_layers)
    experts = [blueprint.expert_of(layer) for layer in layers]
    types = {
        "w1 and w3": Counter(expert.gate_up.quant_type for expert in experts),
        "w2": Counter(expert.down.quant_type for expert in experts),
    }
    return "; ".join(
        f"{matrix} " + ", ".join(f"{name} in {count}" for name, count in sorted(counts.items()))
        for matrix, counts in types.items()
    )


def usual_type(bits: ExpertSize) -> QuantType | None:
    """Return the type with these bits if they are whole, None for a mix. Raises `UsageError`."""
    if bits.whole is None:
        return None
    known = {TYPES[name].bits for name in mixable_types()}
    if bits.whole not in known:
        raise UsageError(
            f"--expert-bits {bits}: experts have {', '.join(map(str, sorted(known)))} bits",
            hint="Others, like 2.4, mix types. A size like 14GB is the memory for all.",
        )
    return type_of_bits(bits.whole)


def mixable_types() -> list[QuantType]:
    """Return the types that experts can have in some layers only."""
    return [name for name, quantization in TYPES.items() if quantization.mixable]


@functools.cache
def squared_error(quant_type: QuantType) -> float:
    """Return the squared error of a type on normal numbers, relative to their squares."""
    rows, columns = _SAMPLE_SHAPE
    weight = torch.randn(_SAMPLE_SHAPE, generator=torch.Generator().manual_seed(0))
    spec = LinearSpec("w", rows, columns, quant_type, torch.float32, "search")
    wrong = spec.dequantized(spec.encode(weight)) - weight
    return float(wrong.square().sum() / weight.square().sum())


def _sizes(blueprint: Blueprint) -> dict[tuple[QuantType, QuantType], int]:
    """Return the bytes of an expert, by the types that its matrices can have."""
    stored = blueprint.quantization
    config = blueprint.config
    return {
        (up, down): Blueprint(config, replace(stored, quant_type=up, down=down)).expert.stride
        for up, down in itertools.product(mixable_types(), repeat=2)
    }


def _options(
    sizes: Mapping[tuple[QuantType, QuantType], int], sensitivity: Sensitivity
) -> Iterator[_Candidate]:
    for (up, down), size in sizes.items():
        cost = sensitivity.up * squared_error(up) + sensitivity.down * squared_error(down)
        yield _Candidate(size, cost, (up, None if down == up else down))


def _steps(options: Sequence[_Candidate]) -> Iterator[tuple[float, _Candidate]]:
    """Yield the larger options of the lower convex hull, with the cost saved for each byte.

    The savings fall.
    """
    now = min(options)
    while better := [
        option for option in options if option.size > now.size and option.cost < now.cost
    ]:
        rates = {option: (now.cost - option.cost) / (option.size - now.size) for option in better}
        now = max(better, key=lambda option: (rates[option], option.size))
        yield rates[now], now
