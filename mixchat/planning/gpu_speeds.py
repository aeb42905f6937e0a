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

# The part of a memory's bandwidth at which a kernel reads each type, if arithmetic does not hold it
# up. Assumed until a card measures it. Codes of 6 bits lie in two planes.
EFFICIENCY: dict[QuantType, float] = {
    "none": 0.80,
    "int8": 0.80,
    "nf4": 0.80,
    "mxfp4": 0.80,
    "int6": 0.75,
    "trellis3": 0.75,
    "trellis2": 0.75,
}
# Instructions of a thread for each weight in the loop of `kernels/gpu/product.py`, compiled for
# sm_89. `tests/kernels/gpu/assembly.py` counts them. An RTX 3090 has time for 12 a weight of 4 bits
# and 6 a weight of 2 bits, and an H100 for half as many.
INSTRUCTIONS: dict[QuantType, float] = {
    "none": 3.7,
    "int8": 3.3,
    "nf4": 4.4,
    "mxfp4": 4.7,
    "int6": 6.6,
    "trellis3": 12.3,
    "trellis2": 8.7,
}
# Assumed figures of all cards.
BUS_PART = 0.8  # of a slot's bandwidth that a copy from page-locked RAM reaches
LANES_PART = 0.8  # of a card's instructions that a kernel without waits gets
COMPUTE_PART = 0.5  # of a card's rate that matrix products of a prompt reach
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
    compute: operations a second of 16-bit matrix products. efficiency: by type, the measured part
    of `memory` at which a kernel reads codes. lanes: instructions a second of single threads, None
    if unknown. origin: of the first three figures.
    """

    name: str
    memory: float
    bus: float
    compute: float
    efficiency: dict[str, float] = field(default_factory=dict)
    origin: Origin = "measured"
    lanes: float | None = None

    @classmethod
    def of_card(cls, card: Card) -> GPUSpeeds:
        """Return the figures that follow from a data sheet."""
        compute = COMPUTE_PART * card.compute
        if card.capability is not None and card.capability < _BF16_CAPABILITY:
            compute *= _BF16_PART
        origin: Origin = "card" if card.is_known else "assumed"
        bus, lanes = BUS_PART * card.bus, LANES_PART * card.lanes
        return cls(card.name, card.bandwidth, bus, compute, origin=origin, lanes=lanes)

    @classmethod
    def from_dict(cls, entry: Any) -> GPUSpeeds:
        """Read what `dataclasses.asdict` wrote. Raises one of several errors if it is damaged."""
        memory, bus, compute = (float(entry[name]) for name in ("memory", "bus", "compute"))
        efficiency = {str(name): float(share) for name, share in entry["efficiency"].items()}
        if not all(
            0 < figure < math.inf for figure in (memory, bus, compute, *efficiency.values())
        ):
            raise ValueError
        return cls(str(entry["name"]), memory, bus, compute, efficiency)

    def part_for(self, matrix: LinearSpec) -> float:
        """Return the part of `memory` at which a product of one row reads a matrix."""
        name = matrix.quant_type
        if name in self.efficiency:
            return self.efficiency[name]
        weights = matrix.stored_rows * matrix.columns
        most = math.inf
        if self.lanes is not None:
            most = self.lanes / INSTRUCTIONS[name] * matrix.nbytes / weights / self.memory
        return min(EFFICIENCY[name], most)

    def reading(self, matrices: Iterable[LinearSpec]) -> float:
        """Return the seconds of products of one row with these matrices."""
        return sum(matrix.nbytes / (self.memory * self.part_for(matrix)) for matrix in matrices)

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
            name: median(sample.efficiency.get(name, known) for sample in samples)
            for name, known in first.efficiency.items()
        },
    )
