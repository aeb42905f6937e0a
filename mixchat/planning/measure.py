"""Measures how fast this machine copies and computes experts, and what else a token takes.

All figures are medians of a few repetitions; all together, the disk's included, take about three
seconds for Mixtral's shapes on two cores. Experts are made up, because no kernel's time depends on
their numbers.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from mixchat.experts.memory import CPU
from mixchat.planning.calibration import Calibration, interpolate
from mixchat.planning.disk_speed import measure_disk
from mixchat.weights.format.blueprint import Blueprint

Copy = Callable[[torch.Tensor, torch.Tensor], object]  # to a block on the device, from one in RAM

ROWS = (1, 8, 64, 512)
# Codes, scales and weights alike, in 16 or 32 bits, are then numbers that slow no arithmetic.
_FILLING = 0x3C


@dataclass(frozen=True)
class Effort:
    """How much is measured. `seconds`: the least time for a figure; some take many times that."""

    file_bytes: int = 512_000_000  # of the file that is read, at least four experts
    pool_bytes: int = 256_000_000  # of experts computed in turn, so that no CPU cache holds them
    seconds: float = 0.25


FULL = Effort()
SAMPLE = Effort(seconds=0.1)  # for one of several calibrations


@torch.inference_mode()
def measure(
    blueprint: Blueprint,
    directory: Path,
    device: torch.device,
    layer: Callable[[], object],
    *,
    copy: Copy = torch.Tensor.copy_,
    effort: Effort = FULL,
) -> Calibration:
    """Measure this machine for a model of this shape, computed on `device`: its experts, and
    all else of a layer, for one token, by `layer`.

    Torch takes as many threads as it has been told to take before.

    directory: where models are kept, which is on the disk to be measured. A file is written there
    for a moment, which never has a name: it goes with the process, whatever ends that.
    """
    stride = blueprint.expert.stride
    host = _Experts(blueprint, CPU, effort)
    seconds = {str(CPU): host.seconds()}
    size = max(4 * stride, effort.file_bytes)
    disk = measure_disk(directory, stride, size, host.compute_next, effort.seconds)
    copy_bandwidth = None
    if device == CPU:
        layer_seconds = host.median_of(layer)
    else:
        other = _Experts(blueprint, device, effort)
        layer_seconds = other.median_of(layer)
        seconds[str(device)] = other.seconds()
        copy_bandwidth = other.copy_bandwidth(copy)
        del other
        if device.type == "cuda":
            torch.cuda.empty_cache()  # or it would count as taken
    bandwidth, idle, direct = disk or (None, None, False)
    memory = blueprint.expert.nbytes / seconds[str(CPU)][1]
    return Calibration(bandwidth, idle, direct, memory, copy_bandwidth, seconds, layer_seconds)


@torch.inference_mode()
def thread_seconds(
    blueprint: Blueprint, counts: Sequence[int], effort: Effort = FULL
) -> dict[int, float]:
    """Seconds that one expert takes for one row with so many threads: the best of two rounds.

    Torch then takes as many as before.
    """
    before, experts = torch.get_num_threads(), _Experts(blueprint, CPU, effort)
    seconds = dict.fromkeys(counts, math.inf)
    try:
        for count in [*counts, *counts]:  # a machine's pace may change from one to the next
            torch.set_num_threads(count)
            seconds[count] = min(seconds[count], experts.median_of(experts.compute_next))
    finally:
        torch.set_num_threads(before)
    return seconds


class _Experts:
    """Made-up experts on a device, of which each is computed in turn."""

    def __init__(self, blueprint: Blueprint, device: torch.device, effort: Effort) -> None:
        layout = blueprint.computed_on(device).expert
        count = max(2, -(-effort.pool_bytes // layout.stride))
        shape = (count, layout.stride)
        self._blocks = torch.full(shape, _FILLING, dtype=torch.uint8, device=device)
        self._turns = itertools.cycle([layout.build(block) for block in self._blocks])
        self._columns, self._dtype = layout.w13.columns, blueprint.quantization.dtype
        self._device, self._effort = device, effort
        self._one_row = self._rows(1)

    def compute_next(self) -> None:
        """Compute one expert for one row."""
        next(self._turns)(self._one_row)

    def seconds(self) -> dict[int, float]:
        """Seconds for an expert by count of rows; without a last one that takes all too long."""
        seconds: dict[int, float] = {}
        for rows in ROWS:
            if len(seconds) > 1 and interpolate(seconds, rows) > 10 * self._effort.seconds:
                break
            seconds[rows] = self._seconds_for(self._rows(rows))
        return seconds

    def copy_bandwidth(self, copy: Copy) -> float:
        """Bytes a second from page-locked RAM."""
        source = torch.full_like(self._blocks[0], _FILLING, device=CPU)
        if self._device.type == "cuda":
            source = source.pin_memory()
        targets = itertools.cycle(self._blocks)
        return source.nbytes / self.median_of(lambda: copy(next(targets), source))

    def _rows(self, count: int) -> torch.Tensor:
        numbers = torch.linspace(-1, 1, count * self._columns, device=self._device)
        return numbers.view(count, self._columns).to(self._dtype)

    def _seconds_for(self, x: torch.Tensor) -> float:
        # Other devices work while the next call is prepared, as they do in decoding.
        calls = 1 if self._device == CPU else len(self._blocks)

        def run() -> None:
            for _ in range(calls):
                next(self._turns)(x)

        return self.median_of(run) / calls

    def median_of(self, run: Callable[[], object]) -> float:
        """Seconds that `run` takes; the first time, when much is set up, does not count."""
        samples: list[float] = []
        least, most = self._effort.seconds, 3 * self._effort.seconds
        self._seconds_of(run)
        while (spent := sum(samples)) < least or (len(samples) < 5 and spent < most):
            samples.append(self._seconds_of(run))
        return median(samples)

    def _seconds_of(self, run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        _synchronize(self._device)
        return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    """Return when the device has done all it was told to; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
