"""The speeds at which a machine reads, copies and computes experts."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from datetime import datetime
from statistics import median
from typing import Any

from mixchat.base.quantities import format_age
from mixchat.planning.gpu_speeds import GPUSpeeds, typical_gpu

_LIFETIME_S = 30 * 86400  # of a measurement
BUSY_LIFETIME_S = 600  # of a measurement while other programs were busy
BUSY = 0.2  # of the cores' time that other programs take
# The part of the disk's measured speed that reads into slots of small pages have.
# `tests/benchmarks/beyond_memory.py` measures 0.7 to 0.95.
IN_USE = 0.85
# Of a layer on a CPU, whatever its size. Granite's took 0.13 ms longer than reading its bytes.
LAYER_START_S = 1e-4
_MAX_SPREAD = 1.5  # of a steady machine, the fastest over the slowest sample
# The figures that are one number each. The disk's are None if it could not be measured.
_FIGURES = (
    "disk_bandwidth",
    "disk_bandwidth_idle",
    "disk_bandwidth_fresh",
    "memory_bandwidth",
    "layer_seconds",
)


@dataclass(frozen=True)
class MachineSpeeds:
    """One sample of the figures, in bytes a second and seconds."""

    disk_bandwidth: float | None  # of experts in a row, while the CPU computes others
    disk_bandwidth_idle: float | None  # while the CPU does not compute
    disk_bandwidth_fresh: float | None  # idle, into memory that was not used before
    memory_bandwidth: float  # at which the CPU computes experts of one row that are in RAM
    expert_seconds: dict[int, float]  # by count of rows, on the CPU
    layer_seconds: float  # for all of a layer but its experts, one token, on the CPU
    gpus: tuple[GPUSpeeds, ...] = ()

    @classmethod
    def from_dict(cls, entry: Any, gpus: int) -> MachineSpeeds:
        """Read what `dataclasses.asdict` wrote of a machine with so many GPUs.

        Raises one of several errors if a figure is missing or impossible.
        """
        by_rows = entry["expert_seconds"].items()
        seconds = {int(rows): _figure(seconds) for rows, seconds in by_rows}
        speeds = tuple(map(GPUSpeeds.from_dict, entry["gpus"]))
        if len(seconds) < 2 or len(speeds) != gpus:
            raise ValueError
        figures = {name: _figure(entry[name]) for name in _FIGURES}
        return cls(expert_seconds=seconds, gpus=speeds, **figures)

    @property
    def copy_bandwidth(self) -> float | None:
        """Return the bytes a second from page-locked RAM to the first GPU, None without one."""
        return self.gpus[0].bus if self.gpus else None

    @property
    def in_use(self) -> MachineSpeeds:
        """Return the figures with the disk as reads into slots have it."""
        busy, idle = self.disk_bandwidth, self.disk_bandwidth_idle
        return replace(
            self,
            disk_bandwidth=None if busy is None else IN_USE * busy,
            disk_bandwidth_idle=None if idle is None else IN_USE * idle,
        )

    @property
    def cold(self) -> MachineSpeeds:
        """Return the figures of a cold start, when all memory is fresh."""
        fresh = self.disk_bandwidth_fresh
        return replace(self, disk_bandwidth=fresh, disk_bandwidth_idle=fresh)

    def expert_time(self, rows: float) -> float:
        """Return the seconds of one expert for `rows` rows, at least 1, on the CPU.

        With 1 s for 8 rows and 5 s for 64, 36 rows take 3 s. Time grows on beyond the last count.
        """
        return interpolate(self.expert_seconds, rows)


@dataclass(frozen=True)
class Measurement:
    """Samples that were taken one after the other."""

    measured_at: float  # seconds since 1970
    samples: tuple[MachineSpeeds, ...]
    cpu: str = ""
    directory: str = ""  # on the disk that was read
    other_programs: float = 0.0  # the part of the cores' time that they took, 0 to 1

    @classmethod
    def from_dict(cls, entry: Any, gpus: int) -> Measurement | None:
        """Read what `dataclasses.asdict` wrote, or None if it is damaged."""
        try:
            samples = tuple(MachineSpeeds.from_dict(sample, gpus) for sample in entry["samples"])
            measured_at = _figure(entry["measured_at"])
            other_programs = float(entry["other_programs"])
            datetime.fromtimestamp(measured_at)  # `plan` shows it
            names = str(entry["cpu"]), str(entry["directory"])
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError, OSError):
            return None
        return cls(measured_at, samples, *names, other_programs) if samples else None

    @property
    def complete(self) -> bool:
        """Return whether the disk was measured each time."""
        return all(sample.disk_bandwidth is not None for sample in self.samples)

    @property
    def busy(self) -> bool:
        """Return whether other programs wanted the cores or the memory."""
        speeds = [sample.memory_bandwidth for sample in self.samples]
        return self.other_programs > BUSY or max(speeds) > _MAX_SPREAD * min(speeds)

    def outdated(self, now: float) -> str | None:
        """Return why to measure again, as the end of a sentence, or None."""
        age = now - self.measured_at
        if age > _LIFETIME_S:
            return f"the last time was {format_age(age)}"
        if self.busy and age > BUSY_LIFETIME_S:
            return f"it was busy the last time, {format_age(age)}"
        return None

    @property
    def in_use(self) -> tuple[MachineSpeeds, ...]:
        """Return the typical figures and then each sample, by `MachineSpeeds.in_use`."""
        return tuple(speeds.in_use for speeds in (self.typical, *self.samples))

    @property
    def typical(self) -> MachineSpeeds:
        """Return the median of each figure."""
        figures: dict[str, Any] = {}
        for name in _FIGURES:
            values = [getattr(sample, name) for sample in self.samples]
            known = [value for value in values if value is not None]
            figures[name] = median(known) if known else None
        by_sample = [sample.expert_seconds for sample in self.samples]
        # A slow machine leaves out the large counts of rows, not in every sample the same.
        counts = sorted(set.intersection(*map(set, by_sample)))
        seconds = {rows: median(s[rows] for s in by_sample) for rows in counts}
        by_gpu = zip(*(sample.gpus for sample in self.samples), strict=True)
        gpus = tuple(map(typical_gpu, by_gpu))
        return MachineSpeeds(expert_seconds=seconds, gpus=gpus, **figures)


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
