"""How fast this machine reads, copies and computes experts, and the file that remembers it."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from mixchat import machine
from mixchat.errors import CheckpointError
from mixchat.experts.memory import CPU
from mixchat.files import read_json_object, write_private_file
from mixchat.kernels.compile import KERNELS
from mixchat.weights.format.blueprint import Blueprint

_FORMAT = 2  # of the file of results; one of another format is measured again
SAMPLES = 3  # of a measurement
_KEPT = 32  # results in that file: the numbers of some disks change with every start


@dataclass(frozen=True)
class Calibration:
    """What was measured, in bytes a second and seconds.

    disk_bandwidth: experts read one after the other while the CPU computes others, and
    disk_bandwidth_idle while it does not, both in the faster way: past the page cache (O_DIRECT) if
    `disk_direct`. None where the disk could not be measured: no room, or no right to write.
    memory_bandwidth: at which the CPU computes experts of one row that lie in RAM.
    copy_bandwidth: from page-locked RAM to the device; None for a CPU.
    expert_seconds: for "cpu" and the device, by count of rows.
    layer_seconds: for all of a layer but its experts, one token, on the device.
    """

    disk_bandwidth: float | None
    disk_bandwidth_idle: float | None
    disk_direct: bool
    memory_bandwidth: float
    copy_bandwidth: float | None
    expert_seconds: dict[str, dict[int, float]]
    layer_seconds: float

    def expert_time(self, device: str, rows: int) -> float:
        """Seconds that one expert takes for `rows` rows, at least 1, on "cpu" or the device.

        With 1 s for 8 rows and 5 s for 64, 36 rows take 3 s. Beyond the last count measured, time
        grows as between the last two, and never falls.
        """
        return interpolate(self.expert_seconds[device], rows)


@dataclass(frozen=True)
class Measurement:
    """Calibrations that were made one after the other, and when: seconds since 1970.

    They differ as much as the machine's pace does, with what else it does meanwhile.
    """

    measured_at: float
    samples: tuple[Calibration, ...]

    @property
    def complete(self) -> bool:
        """Return whether the disk was measured each time."""
        return all(sample.disk_bandwidth is not None for sample in self.samples)

    @property
    def typical(self) -> Calibration:
        """The median of each figure."""
        samples = self.samples
        first = samples[0]
        return Calibration(
            disk_bandwidth=_median(sample.disk_bandwidth for sample in samples),
            disk_bandwidth_idle=_median(sample.disk_bandwidth_idle for sample in samples),
            disk_direct=2 * sum(sample.disk_direct for sample in samples) > len(samples),
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
    """Medians by count of rows, of the counts that every sample has."""
    counts = set.intersection(*(set(sample) for sample in samples))
    return {rows: median(sample[rows] for sample in samples) for rows in sorted(counts)}


def interpolate(seconds: dict[int, float], rows: int) -> float:
    """As `expert_time`, out of at least two measured counts of rows."""
    points = sorted(seconds.items())
    for (fewer, sooner), (more, later) in itertools.pairwise(points):
        slope = (later - sooner) / (more - fewer)
        if rows <= more:
            return sooner + slope * max(rows - fewer, 0)
    return later + max(slope, 0.0) * (rows - more)


def calibration_key(blueprint: Blueprint, directory: Path, device: torch.device) -> str:
    """All that a calibration depends on, as a line."""
    layout = blueprint.computed_on(CPU).expert
    w13 = layout.w13
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    return "; ".join(
        (
            f"{machine.cpu_name()} ({torch.backends.cpu.get_cpu_capability()})",
            f"{machine.usable_cores()} cores, {torch.get_num_threads()} threads",
            f"torch {torch.__version__}, bitsandbytes {version('bitsandbytes')}",
            f"kernels {KERNELS}",
            f"{device}: {gpu}",
            f"disk {machine.nearest_existing(directory).stat().st_dev}",
            f"experts {w13.rows}x{w13.columns} {w13.quant_type} {w13.dtype} "
            f"{'packed' if w13.packed else 'plain'} {layout.stride}",
        )
    )


def load(path: Path, key: str, device: torch.device) -> Measurement | None:
    """The measurement that `path` has under `key`; None where there is none, or it is damaged."""
    return _parse(_read(path).get(key), {str(CPU), str(device)})


def measure_and_keep(path: Path, key: str, measure: Callable[[], Calibration]) -> Measurement:
    """Measure `SAMPLES` times, and keep that in `path` under `key` in place of what was there.

    A file that is damaged is written anew, and one that cannot be written does no harm. A
    measurement without figures of the disk is not kept: there may be room the next time.
    """
    now = time.time()
    measured = Measurement(now, tuple(measure() for _ in range(SAMPLES)))
    if measured.complete:
        _keep(path, key, measured)
    return measured


def _keep(path: Path, key: str, measured: Measurement) -> None:
    # Read only now: another process may have measured meanwhile.
    others = [(other, entry) for other, entry in _read(path).items() if other != key]
    machines = dict([*others[1 - _KEPT :], (key, asdict(measured))])
    content = json.dumps({"format": _FORMAT, "machines": machines}, indent=1)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_private_file(path, content.encode())


def _read(path: Path) -> dict[str, Any]:
    """The entries of a file of results; none where it is missing, damaged or of another format."""
    try:
        content = read_json_object(path, follow=False)
    except CheckpointError:
        return {}
    machines = content.get("machines")
    return machines if content.get("format") == _FORMAT and isinstance(machines, dict) else {}


def _parse(entry: Any, devices: set[str]) -> Measurement | None:
    """The measurement that an entry describes, with figures for these devices; else None."""
    try:
        samples = tuple(_calibration(sample, devices) for sample in entry["samples"])
        known = Measurement(_figure(entry["measured_at"]), samples)
        datetime.fromtimestamp(known.measured_at)  # which is to be shown
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, OSError):
        return None
    return known if samples else None


def _calibration(entry: Any, devices: set[str]) -> Calibration:
    """Raises one of several errors where it has not all of the figures, for these devices."""
    seconds = {
        device: {int(rows): _figure(seconds) for rows, seconds in by_rows.items()}
        for device, by_rows in entry["expert_seconds"].items()
    }
    if set(seconds) != devices or any(len(by_rows) < 2 for by_rows in seconds.values()):
        raise ValueError
    return Calibration(
        disk_bandwidth=_figure(entry["disk_bandwidth"]),
        disk_bandwidth_idle=_figure(entry["disk_bandwidth_idle"]),
        disk_direct=entry["disk_direct"] is True,
        memory_bandwidth=_figure(entry["memory_bandwidth"]),
        copy_bandwidth=_figure(entry["copy_bandwidth"]) if len(devices) > 1 else None,
        expert_seconds=seconds,
        layer_seconds=_figure(entry["layer_seconds"]),
    )


def _figure(value: Any) -> float:
    """A speed or a time out of a file. Raises `ValueError` or `TypeError` on what cannot be one."""
    if not 0 < value < math.inf:
        raise ValueError
    return float(value)
