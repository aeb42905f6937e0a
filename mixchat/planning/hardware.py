"""The hardware that a plan is for, this machine or one that a person describes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mixchat.base import gpu, machine
from mixchat.planning.compute_speed import ROWS
from mixchat.planning.fitting import FreeMemory, MemoryPlan
from mixchat.planning.machine_speeds import MachineSpeeds, Measurement
from mixchat.weights.format.blueprint import Blueprint
from mixchat.weights.matrix.linear import Layout

# Bytes that other programs need on a described machine, and the largest part of all.
_TAKEN_RAM, _TAKEN_GPU, _TAKEN_PART = 2 * 10**9, 5 * 10**8, 0.25
# A cheap card's speeds stand for a described GPU. They are bytes a second of its memory and of the
# bus to it, operations a second, and the seconds to start the kernels of a layer.
GPU_MEMORY, GPU_BUS, GPU_COMPUTE = 3e11, 1.2e10, 2e13
_STARTING = 2e-4


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
        device, *others = devices
        return cls(
            cpu=machine.cpu_name(),
            cores=machine.usable_cores(),
            memory=machine.total_memory(),
            free=FreeMemory.now(devices),
            disk_free=machine.free_disk(directory),
            gpu=gpu.name(device) if gpu.is_gpu(device) else None,
            gpu_memory=gpu.total_memory(device) if gpu.is_gpu(device) else None,
            other_gpus=tuple(
                OtherGPU(str(other), gpu.name(other), gpu.total_memory(other)) for other in others
            ),
        )


@dataclass(frozen=True)
class ToldMachine:
    """The figures that a person tells about a machine, in bytes and bytes a second.

    Figures that are not told are this machine's. So is the speed of the CPU.
    """

    ram: int | None = None
    gpus: tuple[int, ...] = ()
    disk_speed: int | None = None
    free_disk: int | None = None

    @property
    def is_another(self) -> bool:
        return self != NOTHING_TOLD

    def device(self, here: torch.device) -> torch.device:
        """Return the device that computes there, if `here` does on this machine."""
        return torch.device(gpu.KIND, 0) if self.gpus else here

    @property
    def layout(self) -> Layout | None:
        """Return the layout of a download there, None for the one of a download here."""
        return "bitsandbytes" if self.gpus else None

    def measurable(self, fit: MemoryPlan, here: torch.device) -> Blueprint:
        """Return the form of the model that `here` can measure."""
        return fit.computed if here.type == self.device(here).type else fit.blueprint

    def machine(self, here: Machine) -> Machine:
        memory, free = here.memory, here.free
        if self.ram is not None:
            memory, free = self.ram, replace(free, host=_free(self.ram, _TAKEN_RAM), limit=None)
        found = replace(here, memory=memory, free=free)
        if self.free_disk is not None:
            found = replace(found, disk_free=self.free_disk)
        return self._with_gpus(found) if self.gpus else found

    def measurement(
        self, here: Measurement, computed: Blueprint, device: torch.device
    ) -> Measurement:
        """Return a measurement of this machine with what is told."""
        samples = tuple(self._sample(sample, computed, str(device)) for sample in here.samples)
        return replace(here, samples=samples)

    def _with_gpus(self, found: Machine) -> Machine:
        first, *others = self.gpus
        names = [f"{gpu.KIND}:{number}" for number in range(1, len(self.gpus))]
        free = [_free(size, _TAKEN_GPU) for size in self.gpus]
        return replace(
            found,
            free=replace(
                found.free, device=free[0], others=dict(zip(names, free[1:], strict=True))
            ),
            gpu=found.gpu or "a GPU",
            gpu_memory=first,
            other_gpus=tuple(map(OtherGPU, names, ["a GPU"] * len(names), others)),
        )

    def _sample(self, sample: MachineSpeeds, computed: Blueprint, device: str) -> MachineSpeeds:
        if self.disk_speed is not None:
            sample = replace(
                sample,
                disk_bandwidth=self.disk_speed,
                disk_bandwidth_idle=self.disk_speed,
                disk_bandwidth_fresh=self.disk_speed,
            )
        if device in sample.expert_seconds:
            return sample
        return replace(
            sample,
            copy_bandwidth=GPU_BUS,
            expert_seconds={**sample.expert_seconds, device: _gpu_expert_seconds(computed)},
            layer_seconds=_gpu_layer_seconds(computed),
        )


NOTHING_TOLD = ToldMachine()


def _free(size: int, taken: int) -> int:
    return size - min(taken, int(_TAKEN_PART * size))


def _gpu_expert_seconds(computed: Blueprint) -> dict[int, float]:
    expert = computed.expert
    weights = sum(linear.rows * linear.columns for linear in (expert.gate_up, expert.down))
    reading = computed.mean_expert / GPU_MEMORY
    return {rows: reading + 2 * weights * rows / GPU_COMPUTE for rows in ROWS}


def _gpu_layer_seconds(computed: Blueprint) -> float:
    return _STARTING + computed.attention_size / GPU_MEMORY
