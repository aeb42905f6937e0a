"""The speeds at which a machine reads, copies and computes weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from mixchat.base.quantities import format_age
from mixchat.planning.cards import Card
from mixchat.weights.matrix.linear import LinearSpec
from mixchat.weights.matrix.quant_type import QuantType

_LIFETIME_S = 30 * 86400  # of a measurement
BUSY_LIFETIME_S = 600  # of a measurement while other programs were busy
BUSY = 0.2  # of the cores' time that other programs take
# Seconds of a layer on a CPU besides reading its bytes. Granite's layers took 0.13 ms.
LAYER_START_S = 1e-4
# The parts of a data sheet's figures that are reached: by reading weights, by instructions, by
# copies from RAM, and by products of prompts. A single kernel for all of Llama 1B reaches 78% of an
# H100's memory bandwidth ("Look Ma, No Bubbles", Hazy Research 2025).
_MEMORY_PART = 0.8
_LANES_PART = 0.8
_BUS_PART = 0.8
_COMPUTE_PART = 0.5
# Seconds of a kernel in a graph beside its bytes: to start, to wait for the first bytes and to end.
# By the same source, about a hundred kernels reach 50% at most. So each of them loses 1/100 of
# (1/.5 - 1/.78) times the .74 ms in which an H100 could read the 2.47 GB.
KERNEL_S = 5.3e-6
# Seconds from starting a graph until the host knows that it has ended, beside its kernels. It is
# assumed. A driver takes 4 to 6 us to start work (susun-blog.com, "From Launch Overhead to CUDA
# Graph"), and a thread that waits has to wake up.
ROUND_TRIP_S = 2e-5
# Instructions of a GPU's thread for a weight in products of one row, in the machine code for
# sm_86. Other types have too few to count.
INSTRUCTIONS: dict[QuantType, float] = {
    "nf4": 4.4,
    "mxfp4": 4.8,
    "int6": 6.7,
    "trellis2": 8.7,
    "trellis3": 12.4,
}
# Turing has no tensor cores for bf16, so its products run at the rate of fp32.
_BF16_CAPABILITY = (8, 0)
_BF16_PART = 0.25


@dataclass(frozen=True)
class GPUSpeeds:
    """The speeds of one GPU, for models of any shape.

    memory: bytes a second of weights that products of one row read. bus: bytes a second of copies
    from page-locked RAM. compute: operations a second of 16-bit matrix products. lanes:
    instructions a second of single threads. kernel: seconds of a kernel in a graph beside its
    bytes. round_trip: seconds from starting a graph until the host knows that it has ended, beside
    its kernels. source: of all figures.
    """

    name: str
    memory: float
    bus: float
    compute: float
    lanes: float
    kernel: float = KERNEL_S
    round_trip: float = ROUND_TRIP_S
    source: str = "measured"

    @classmethod
    def from_dict(cls, entry: Any) -> GPUSpeeds:
        """Read what `dataclasses.asdict` wrote. Raises one of several errors if it is damaged."""
        names = ("memory", "bus", "compute", "lanes", "kernel", "round_trip")
        memory, bus, compute, lanes, kernel, round_trip = (_figure(entry[name]) for name in names)
        return cls(str(entry["name"]), memory, bus, compute, lanes, kernel, round_trip)

    @classmethod
    def of_card(cls, card: Card) -> GPUSpeeds:
        """Estimate the speeds from a data sheet."""
        compute = _COMPUTE_PART * card.compute
        if card.capability is not None and card.capability < _BF16_CAPABILITY:
            compute *= _BF16_PART
        source = "its data sheet" if card.is_known else "a cheap card"
        return cls(
            card.name,
            memory=_MEMORY_PART * card.bandwidth,
            bus=_BUS_PART * card.bus,
            compute=compute,
            lanes=_LANES_PART * card.lanes,
            source=source,
        )

    def product_time(self, matrix: LinearSpec) -> float:
        """Return the seconds of a product of one row, without those of a kernel.

        They are those of its bytes or of its instructions. An H100 has bytes for more codes of
        trellises than it has time to decode.
        """
        instructions = INSTRUCTIONS.get(matrix.quant_type, 0.0) * matrix.rows * matrix.columns
        return max(matrix.nbytes / self.memory, instructions / self.lanes)

    @classmethod
    def together(cls, gpus: Sequence[GPUSpeeds], shares: Sequence[int]) -> GPUSpeeds:
        """Return the speeds of GPUs that compute one after the other, each its share of the layers.

        So different cards can work together. If each held some experts of every layer, every layer
        would need a round trip of 20 to 40 us.
        """
        used = [(gpus[min(n, len(gpus) - 1)], count) for n, count in enumerate(shares) if count]
        if not used:
            return gpus[0]
        total = sum(count for _, count in used)

        def mean(figure: Callable[[GPUSpeeds], float]) -> float:
            return sum(count * figure(card) for card, count in used) / total

        return replace(
            gpus[0],
            memory=1 / mean(lambda card: 1 / card.memory),
            compute=1 / mean(lambda card: 1 / card.compute),
            lanes=1 / mean(lambda card: 1 / card.lanes),
            kernel=mean(lambda card: card.kernel),
            round_trip=mean(lambda card: card.round_trip),
        )


@dataclass(frozen=True)
class MachineSpeeds:
    """The measured speeds, in bytes a second and seconds.

    The disk's are None if it could not be measured.
    """

    disk_busy: float | None  # of reading experts, while the CPU computes
    disk_idle: float | None  # while the CPU does not compute
    expert_seconds: dict[int, float]  # by count of rows, on the CPU
    layer_seconds: float  # of one token in a layer without its experts, on the CPU
    gpus: tuple[GPUSpeeds, ...] = ()
    measured_at: float = 0.0  # seconds since 1970
    cpu: str = ""
    directory: str = ""  # on the disk that was read
    is_busy: bool = False  # because other programs wanted the cores

    @classmethod
    def from_dict(cls, entry: Any, gpus: int) -> MachineSpeeds | None:
        """Read what `dataclasses.asdict` wrote, None if damaged or of another count of GPUs."""
        try:
            by_rows = entry["expert_seconds"].items()
            speeds = cls(
                _figure(entry["disk_busy"]),
                _figure(entry["disk_idle"]),
                {int(rows): _figure(seconds) for rows, seconds in by_rows},
                _figure(entry["layer_seconds"]),
                tuple(map(GPUSpeeds.from_dict, entry["gpus"])),
                _figure(entry["measured_at"]),
                str(entry["cpu"]),
                str(entry["directory"]),
                bool(entry["is_busy"]),
            )
            datetime.fromtimestamp(speeds.measured_at)  # `plan` shows it
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError, OSError):
            return None
        is_complete = len(speeds.expert_seconds) > 1 and len(speeds.gpus) == gpus
        return speeds if is_complete else None

    def outdated(self, now: float) -> str | None:
        """Return why to measure again, as the end of a sentence, or None."""
        age = now - self.measured_at
        if age > _LIFETIME_S:
            return f"the last time was {format_age(age)}"
        if self.is_busy and age > BUSY_LIFETIME_S:
            return f"it was busy the last time, {format_age(age)}"
        return None

    def expert_time(self, rows: float) -> float:
        """Return the seconds of one expert for `rows` rows, at least 1, on the CPU.

        With 1 s for 8 rows and 5 s for 64, 36 rows take 3 s. Time grows on beyond the last count.
        """
        return interpolate(self.expert_seconds, rows)


def interpolate(seconds: dict[int, float], rows: float) -> float:
    """Return the seconds for `rows` rows, by two or more measured counts."""
    points = sorted(seconds.items())
    for (fewer, sooner), (more, later) in itertools.pairwise(points):
        slope = (later - sooner) / (more - fewer)
        if rows <= more:
            return sooner + slope * max(rows - fewer, 0)
    return later + max(slope, 0.0) * (rows - more)


def _figure(value: Any) -> float:
    """Return a positive number. Raises `ValueError` or `TypeError` if it cannot be one."""
    if not 0 < value < math.inf:
        raise ValueError
    return float(value)
