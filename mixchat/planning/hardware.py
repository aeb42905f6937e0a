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
from mixchat.planning.machine_speeds import GPUSpeeds, MachineSpeeds

# Bytes that other programs need on a described machine, and the largest part of its memory.
_TAKEN_RAM = 2 * 10**9
_TAKEN_GPU = 5 * 10**8
_TAKEN_PART = 0.25


@dataclass(frozen=True)
class InstalledGPU:
    """A GPU of a machine, with its bytes of memory."""

    device: str  # torch's name
    name: str  # for people
    memory: int


@dataclass(frozen=True)
class Machine:
    """The hardware, in bytes, with the GPUs that compute, none if the CPU does."""

    cpu: str
    cores: int
    memory: int
    free: FreeMemory
    disk_free: int
    gpus: tuple[InstalledGPU, ...] = ()

    @classmethod
    def now(cls, directory: Path, devices: Sequence[torch.device]) -> Machine:
        """Return this machine, with the disk of `directory`, which need not exist."""
        return cls(
            cpu=machine.cpu_name(),
            cores=machine.usable_cores(),
            memory=machine.total_memory(),
            free=FreeMemory.now(devices),
            disk_free=machine.free_disk(directory),
            gpus=tuple(
                InstalledGPU(str(device), gpu.name(device), gpu.total_memory(device))
                for device in devices
                if gpu.is_gpu(device)
            ),
        )

    def without_gpus(self) -> Machine:
        """Return the machine if only its CPU computes."""
        return replace(self, free=self.free.without_gpus(), gpus=())


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
        """Return the device that computes there. `here` computes on this machine."""
        return torch.device(gpu.KIND, 0) if self.gpus else here

    def machine(self, here: Machine) -> Machine:
        """Return this machine, `here`, with the figures that are told."""
        there = here
        free = here.free
        if self.ram is not None:
            free = replace(free, host=_free(self.ram, _TAKEN_RAM), limit=None)
            there = replace(there, memory=self.ram)
        if self.free_disk is not None:
            there = replace(there, disk_free=self.free_disk)
        if self.gpus:
            installed = tuple(
                InstalledGPU(f"{gpu.KIND}:{number}", card.name, card.memory)
                for number, card in enumerate(self.gpus)
            )
            first, *more = installed
            others = {card.device: _free(card.memory, _TAKEN_GPU) for card in more}
            free = replace(free, device=_free(first.memory, _TAKEN_GPU), other_gpus=others)
            there = replace(there, gpus=installed)
        return replace(there, free=free)

    def speeds(self, here: MachineSpeeds) -> MachineSpeeds:
        """Return the speeds of this machine with the figures that are told."""
        if (rate := self.disk_speed) is not None:
            here = replace(here, disk_busy=float(rate), disk_idle=float(rate))
        if self.gpus:
            measured = zip_longest(self.gpus, here.gpus[: len(self.gpus)])
            here = replace(
                here,
                gpus=tuple(
                    GPUSpeeds.of_card(card) if card.is_known or speeds is None else speeds
                    for card, speeds in measured
                ),
            )
        return here


NOTHING_TOLD = ToldMachine()


def _free(size: int, taken: int) -> int:
    return size - min(taken, int(_TAKEN_PART * size))
