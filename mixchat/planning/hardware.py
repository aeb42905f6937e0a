"""The hardware that a plan is for, this machine or one that a person describes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

import torch

from mixchat.base import gpu, machine
from mixchat.planning.cards import Card
from mixchat.planning.fitting import FreeMemory
from mixchat.planning.gpu_speeds import GPUSpeeds
from mixchat.planning.machine_speeds import Measurement

# Bytes that other programs need on a described machine, and the largest part of all.
_TAKEN_RAM, _TAKEN_GPU, _TAKEN_PART = 2 * 10**9, 5 * 10**8, 0.25


@dataclass(frozen=True)
class OtherGPU:
    """A GPU that is not the first one."""

    device: str  # torch's name
    name: str  # for people
    memory: int  # bytes


@dataclass(frozen=True)
class Machine:
    """The hardware, in bytes. `gpu` and `gpu_memory` are None if the CPU computes."""

    cpu: str
    cores: int
    memory: int
    free: FreeMemory
    disk_free: int
    gpu: str | None = None
    gpu_memory: int | None = None
    other_gpus: tuple[OtherGPU, ...] = ()

    @classmethod
    def now(cls, directory: Path, devices: Sequence[torch.device]) -> Machine:
        """Return this machine, with the disk of `directory`, which need not exist."""
        device, *more = devices
        return cls(
            cpu=machine.cpu_name(),
            cores=machine.usable_cores(),
            memory=machine.total_memory(),
            free=FreeMemory.now(devices),
            disk_free=machine.free_disk(directory),
            gpu=gpu.name(device) if gpu.is_gpu(device) else None,
            gpu_memory=gpu.total_memory(device) if gpu.is_gpu(device) else None,
            other_gpus=tuple(OtherGPU(str(d), gpu.name(d), gpu.total_memory(d)) for d in more),
        )

    def without_gpus(self) -> Machine:
        """Return the machine if only its CPU computes."""
        free = self.free.without_gpus()
        return replace(self, free=free, gpu=None, gpu_memory=None, other_gpus=())


@dataclass(frozen=True)
class ToldMachine:
    """The figures that a person tells about a machine, in bytes and bytes a second.

    Figures that are not told are this machine's. So is the speed of the CPU, and of a GPU that is
    told without a name.
    """

    ram: int | None = None
    gpus: tuple[Card, ...] = ()
    disk_speed: int | None = None
    free_disk: int | None = None

    @property
    def is_another(self) -> bool:
        return self != NOTHING_TOLD

    def device(self, here: torch.device) -> torch.device:
        """Return the device that computes there, if `here` does on this machine."""
        return torch.device(gpu.KIND, 0) if self.gpus else here

    def machine(self, here: Machine) -> Machine:
        """Return this machine, `here`, with the figures that are told."""
        there = here
        if self.ram is not None:
            free = replace(here.free, host=_free(self.ram, _TAKEN_RAM), limit=None)
            there = replace(here, memory=self.ram, free=free)
        if self.free_disk is not None:
            there = replace(there, disk_free=self.free_disk)
        if not self.gpus:
            return there
        first, *more = self.gpus
        names = [f"{gpu.KIND}:{number}" for number in range(1, len(self.gpus))]
        first_free, *more_free = (_free(card.memory, _TAKEN_GPU) for card in self.gpus)
        other_gpus = dict(zip(names, more_free, strict=True))
        return replace(
            there,
            free=replace(there.free, device=first_free, other_gpus=other_gpus),
            gpu=first.name if first.is_known else there.gpu or first.name,
            gpu_memory=first.memory,
            other_gpus=tuple(
                OtherGPU(name, card.name, card.memory)
                for name, card in zip(names, more, strict=True)
            ),
        )

    def measurement(self, here: Measurement) -> Measurement:
        """Return a measurement of this machine with what is told."""
        samples = []
        for sample in here.samples:
            if (rate := self.disk_speed) is not None:
                sample = replace(
                    sample,
                    disk_bandwidth=rate,
                    disk_bandwidth_idle=rate,
                    disk_bandwidth_fresh=rate,
                )
            if self.gpus:
                speeds = [
                    GPUSpeeds.of_card(card) if card.is_known or measured is None else measured
                    for card, measured in zip_longest(self.gpus, sample.gpus[: len(self.gpus)])
                ]
                sample = replace(sample, gpus=tuple(speeds))
            samples.append(sample)
        return replace(here, samples=tuple(samples))


NOTHING_TOLD = ToldMachine()


def _free(size: int, taken: int) -> int:
    return size - min(taken, int(_TAKEN_PART * size))
