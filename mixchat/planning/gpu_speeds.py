"""The figures of a GPU that its speed follows from, and the seconds of work by them.

Decoding is bound by memory. A kernel reads the codes of a type at a part of the memory's bandwidth.
Prompts are bound by arithmetic. Weights become 16-bit numbers once for a chunk of tokens, and
tensor cores multiply them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, Literal

from mixchat.planning.cards import Card
from mixchat.weights.matrix.linear import LinearSpec
from mixchat.weights.matrix.quant_type import QuantType

# The part of a memory's bandwidth at which a kernel reads each type. Assumed until a card measures
# it. A weight of 4 or 8 bits takes a look into a table or a conversion, codes of 5 and 6 bits lie
# in two planes, and a trellis takes a multiplication and a look into a table.
EFFICIENCY: dict[QuantType, float] = {
    "none": 0.80,
    "int8": 0.80,
    "nf4": 0.80,
    "fp4": 0.80,
    "mxfp4": 0.80,
    "int6": 0.75,
    "int5": 0.75,
    "trellis3": 0.60,
    "trellis2": 0.60,
}
# Assumed figures of all cards.
BUS_PART = 0.8  # of a slot's bandwidth that a copy from page-locked RAM reaches
COMPUTE_PART = 0.5  # of a card's rate that matrix products of a prompt reach
KERNELS_PER_LAYER = 12  # of one token; `tests/benchmarks/gpu_budget.py` counts them
KERNEL_S = 2e-6  # to start and end one kernel of a CUDA graph
SYNC_S = 2e-5  # until the host sees a result, or the GPU sees what the host computed
_LAUNCH_S = 5e-6  # to start a kernel without a graph, as in prompts
_PROMPT_LAUNCHES = 3  # of a matrix of a prompt: dequantizing, product, activation
# Turing has no tensor cores for bf16, so its products run at the rate of fp32.
_BF16_CAPABILITY, _BF16_PART = (8, 0), 0.25

Origin = Literal["measured", "card", "assumed"]


@dataclass(frozen=True)
class GPUSpeeds:
    """The figures of one GPU.

    memory: bytes a second of its memory. bus: bytes a second of copies from page-locked RAM.
    compute: operations a second of 16-bit matrix products. efficiency: by type, the part of
    `memory` at which a kernel reads codes; the others are assumed. origin: of the first three
    figures.
    """

    name: str
    memory: float
    bus: float
    compute: float
    efficiency: dict[str, float] = field(default_factory=dict)
    origin: Origin = "measured"

    @classmethod
    def of_card(cls, card: Card) -> GPUSpeeds:
        """Return the figures that follow from a data sheet."""
        compute = COMPUTE_PART * card.compute
        if card.capability is not None and card.capability < _BF16_CAPABILITY:
            compute *= _BF16_PART
        origin: Origin = "card" if card.is_known else "assumed"
        return cls(card.name, card.bandwidth, BUS_PART * card.bus, compute, origin=origin)

    @classmethod
    def from_dict(cls, entry: Any) -> GPUSpeeds:
        """Read what `dataclasses.asdict` wrote. Raises one of several errors if it is damaged."""
        memory, bus, compute = (float(entry[name]) for name in ("memory", "bus", "compute"))
        efficiency = {str(name): float(part) for name, part in entry["efficiency"].items()}
        if not all(
            0 < figure < math.inf for figure in (memory, bus, compute, *efficiency.values())
        ):
            raise ValueError
        return cls(str(entry["name"]), memory, bus, compute, efficiency)

    def efficiency_of(self, quant_type: QuantType) -> float:
        return self.efficiency.get(quant_type, EFFICIENCY[quant_type])

    def reading(self, matrices: Iterable[LinearSpec]) -> float:
        """Return the seconds of products of one row with these matrices."""
        return sum(
            sum(tensor.nbytes for tensor in matrix.tensors)
            / (self.memory * self.efficiency_of(matrix.quant_type))
            for matrix in matrices
        )

    def multiplying(self, matrices: Iterable[LinearSpec], rows: float) -> float:
        """Return the seconds of products of a prompt's `rows` rows with these matrices."""
        seconds = 0.0
        for matrix in matrices:
            weights = matrix.rows * matrix.columns
            dense = 2 * weights / self.memory  # to write or to read 16-bit weights once
            if matrix.quant_type != "none":
                seconds += self.reading([matrix]) + dense
            seconds += max(2 * weights * rows / self.compute, dense)
            seconds += _PROMPT_LAUNCHES * _LAUNCH_S
        return seconds


def typical_gpu(samples: Sequence[GPUSpeeds]) -> GPUSpeeds:
    """Return the median of each figure of several samples of one GPU."""
    first, *_ = samples
    return replace(
        first,
        memory=median(sample.memory for sample in samples),
        bus=median(sample.bus for sample in samples),
        compute=median(sample.compute for sample in samples),
        efficiency={
            name: median(sample.efficiency.get(name, part) for sample in samples)
            for name, part in first.efficiency.items()
        },
    )
