"""The measured figures: the speed at which a machine reads, copies and computes experts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from statistics import median
from typing import Any

from mixchat.base.quantities import format_age

_LIFETIME = 30 * 86400  # seconds that a measurement is trusted
_CALMS_DOWN = 600  # seconds that a busy machine is given before it is measured again
BUSY = 0.2  # of the cores that other programs take
# Of the disk's measured speed, what reads into slots have: these take nearly all memory, so that
# many are made of small pages. Measured with `tests/benchmarks/beyond_memory.py`: 0.7 to 0.95.
IN_USE = 0.85
_STEADY = 1.5  # times as fast as the slowest sample may the fastest one be


@dataclass(frozen=True)
class MachineSpeeds:
    """One sample of the figures, in bytes a second and seconds.

    disk_bandwidth: of experts read one after the other while the CPU computes others, and
    disk_bandwidth_idle while it does not; disk_bandwidth_fresh: as idle, into memory that was not
    used before. All three are None where the disk could not be measured, for lack of room or of the
    right to write.
    memory_bandwidth: at which the CPU computes experts of one row that lie in RAM.
    copy_bandwidth: from page-locked RAM to the device; None for a CPU.
    expert_seconds: for "cpu" and the device, by count of rows.
    layer_seconds: for all of a layer but its experts, one token, on the device.
    """

    disk_bandwidth: float | None
    disk_bandwidth_idle: float | None
    disk_bandwidth_fresh: float | None
    memory_bandwidth: float
    copy_bandwidth: float | None
    expert_seconds: dict[str, dict[int, float]]
    layer_seconds: float

    @classmethod
    def from_dict(cls, entry: Any, devices: set[str]) -> MachineSpeeds:
        """Read what `dataclasses.asdict` wrote; other keys do no harm.

        Raises one of several errors where a figure is missing or impossible, or where the figures
        are not those of exactly these devices.
        """
        seconds = {
            device: {int(rows): _figure(seconds) for rows, seconds in by_rows.items()}
            for device, by_rows in entry["expert_seconds"].items()
        }
        if set(seconds) != devices or any(len(by_rows) < 2 for by_rows in seconds.values()):
            raise ValueError
        return cls(
            disk_bandwidth=_figure(entry["disk_bandwidth"]),
            disk_bandwidth_idle=_figure(entry["disk_bandwidth_idle"]),
            disk_bandwidth_fresh=_figure(entry["disk_bandwidth_fresh"]),
            memory_bandwidth=_figure(entry["memory_bandwidth"]),
            copy_bandwidth=_figure(entry["copy_bandwidth"]) if len(devices) > 1 else None,
            expert_seconds=seconds,
            layer_seconds=_figure(entry["layer_seconds"]),
        )

    @property
    def in_use(self) -> MachineSpeeds:
        """Return the figures with the disk as tokens have it, which wait for experts in slots."""
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

    def expert_time(self, device: str, rows: float) -> float:
        """Return the seconds of one expert for `rows` rows, at least 1, on "cpu" or the device.

        With 1 s for 8 rows and 5 s for 64, 36 rows take 3 s. Beyond the last count measured, time
        grows as between the last two, and never falls.
        """
        return interpolate(self.expert_seconds[device], rows)


@dataclass(frozen=True)
class Measurement:
    """Samples that were taken one after the other, when (seconds since 1970), and on what.

    cpu: its name; directory: on the disk that was read; others: the part of the cores' time, 0 to
    1, that other programs took meanwhile.
    """

    measured_at: float
    samples: tuple[MachineSpeeds, ...]
    cpu: str = ""
    directory: str = ""
    others: float = 0.0

    @classmethod
    def from_dict(cls, entry: Any, devices: set[str]) -> Measurement | None:
        """Read what `dataclasses.asdict` wrote, for these devices; None where it is damaged."""
        try:
            samples = tuple(MachineSpeeds.from_dict(sample, devices) for sample in entry["samples"])
            found = cls(
                _figure(entry["measured_at"]),
                samples,
                str(entry["cpu"]),
                str(entry["directory"]),
                float(entry["others"]),
            )
            datetime.fromtimestamp(found.measured_at)  # which is to be shown
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError, OSError):
            return None
        return found if samples else None

    @property
    def complete(self) -> bool:
        """Return whether the disk was measured each time."""
        return all(sample.disk_bandwidth is not None for sample in self.samples)

    @property
    def busy(self) -> bool:
        """Return whether other programs wanted the cores or the memory meanwhile."""
        speeds = [sample.memory_bandwidth for sample in self.samples]
        return self.others > BUSY or max(speeds) > _STEADY * min(speeds)

    def outdated(self, now: float) -> str | None:
        """Return why to measure again, as the end of a sentence; None if there is no reason.

        A machine that was busy is given some time first.
        """
        age = now - self.measured_at
        if age > _LIFETIME:
            return f"the last time was {format_age(age)}"
        if self.busy and age > _CALMS_DOWN:
            return f"it was busy the last time, {format_age(age)}"
        return None

    @property
    def in_use(self) -> tuple[MachineSpeeds, ...]:
        """Return the typical figures and then those of each sample, as tokens have the disk."""
        return tuple(one.in_use for one in (self.typical, *self.samples))

    @property
    def typical(self) -> MachineSpeeds:
        """Return the median of each figure."""
        samples = self.samples
        first = samples[0]
        return MachineSpeeds(
            disk_bandwidth=_median(sample.disk_bandwidth for sample in samples),
            disk_bandwidth_idle=_median(sample.disk_bandwidth_idle for sample in samples),
            disk_bandwidth_fresh=_median(sample.disk_bandwidth_fresh for sample in samples),
            memory_bandwidth=median(sample.memory_bandwidth for sample in samples),
            copy_bandwidth=_median(sample.copy_bandwidth for sample in samples),
            expert_seconds={
                device: _medians([sample.expert_seconds[device] for sample in samples])
                for device in first.expert_seconds
            },
            layer_seconds=median(sample.layer_seconds for sample in samples),
        )


def _median(figures: Iterable[float | None]) -> float | None:
    known = [figure for figure in figures if figure is not None]
    return median(known) if known else None


def _medians(samples: Sequence[dict[int, float]]) -> dict[int, float]:
    """Return medians by count of rows, of the counts that every sample has."""
    counts = set.intersection(*(set(sample) for sample in samples))
    return {rows: median(sample[rows] for sample in samples) for rows in sorted(counts)}


def interpolate(seconds: dict[int, float], rows: float) -> float:
    """Return the seconds for `rows` rows, out of at least two measured counts of rows."""
    points = sorted(seconds.items())
    for (fewer, sooner), (more, later) in itertools.pairwise(points):
        slope = (later - sooner) / (more - fewer)
        if rows <= more:
            return sooner + slope * max(rows - fewer, 0)
    return later + max(slope, 0.0) * (rows - more)


def _figure(value: Any) -> float:
    """Return a speed or a time. Raises `ValueError` or `TypeError` on what cannot be one."""
    if not 0 < value < math.inf:
        raise ValueError
    return float(value)
