"""Measures how fast this machine is for a model, and remembers the speeds in machine.json."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from mixchat.base import gpu, machine
from mixchat.base.errors import CheckpointError
from mixchat.base.files import read_json_object, write_private_file
from mixchat.base.settings import data_dir
from mixchat.experts.memory import CPU
from mixchat.kernels.cpu.compile import KERNELS
from mixchat.planning.bandwidth import memory_rate
from mixchat.planning.cards import Card, find_card, too_old
from mixchat.planning.compute_speed import ROWS, Effort, ExpertTimer, layer_probe
from mixchat.planning.disk_speed import measure_disk
from mixchat.planning.gpu_speed import measure_gpu
from mixchat.planning.machine_speeds import BUSY, LAYER_START_S, GPUSpeeds, MachineSpeeds
from mixchat.weights.format.blueprint import Blueprint

_FORMAT = 8  # of machine.json
_SECTIONS = ("machines", "gpus")
MOST_SECONDS = 20.0  # unless one try of each figure takes longer
_READ_BYTES = 2**28  # of RAM, for an estimate
_DISK_BANDWIDTH = 2e9  # bytes a second, assumed in an estimate
_MAX_ENTRIES = 32  # because the numbers of some disks change with every start


def saved_speeds(
    blueprint: Blueprint, directory: Path, device: torch.device
) -> MachineSpeeds | None:
    """Return the saved speeds for a model of this shape in `directory`, None if there are none."""
    key = measurement_key(blueprint, directory, device)
    return MachineSpeeds.from_dict(_read("machines").get(key), len(gpus_with(device)))


def estimated_speeds(
    blueprint: Blueprint, gpus: Sequence[torch.device], memory: float | None = None
) -> MachineSpeeds:
    """Estimate the speeds of this machine by the speed of its RAM and the speeds of its GPUs.

    The estimate takes a tenth of a second, or a few seconds if a GPU is measured first. It is good
    enough to choose a device, and is not saved. memory: bytes a second of RAM, instead of the
    measured ones.
    """
    memory = memory or memory_rate(CPU, _READ_BYTES)
    expert_s = blueprint.mean_expert / memory
    return MachineSpeeds(
        _DISK_BANDWIDTH,
        _DISK_BANDWIDTH,
        expert_seconds={1: expert_s, ROWS[-1]: ROWS[-1] * expert_s},
        layer_seconds=LAYER_START_S + blueprint.mean_layer / memory,
        gpus=tuple(map(gpu_speeds, gpus)),
        measured_at=time.time(),
    )


def gpu_speeds(device: torch.device) -> GPUSpeeds:
    """Return the speeds of a GPU, which are measured and saved if they are not known yet.

    If it cannot be measured, return the figures of its data sheet, or those of a cheap GPU.
    """
    with contextlib.suppress(KeyError, TypeError, ValueError):
        return GPUSpeeds.from_dict(_read("gpus")[_gpu_key(device)])
    try:
        speeds = measure_gpu(device)
    except RuntimeError:  # torch's, such as too little memory
        memory = gpu.total_memory(device)
        return GPUSpeeds.of_card(find_card(gpu.name(device), memory) or Card.of_size(memory))
    _save("gpus", _gpu_key(device), asdict(speeds))
    return speeds


def _gpu_key(device: torch.device) -> str:
    return f"{gpu.name(device)}, {gpu.total_memory(device)} bytes; torch {torch.__version__}"


def gpus_with(device: torch.device) -> list[torch.device]:
    """Return a GPU and then this machine's others, none for the CPU."""
    if not gpu.is_gpu(device):
        return []
    first = torch.device(gpu.KIND, device.index or 0)
    more = (torch.device(gpu.KIND, number) for number in range(gpu.count()))
    return [first, *(card for card in more if card != first and not too_old(gpu.capability(card)))]


def measure_machine(blueprint: Blueprint, directory: Path, device: torch.device) -> MachineSpeeds:
    """Measure this machine, and save the result in place of an older one.

    Nothing is saved if the disk was not measured. A file that cannot be written is ignored.
    """
    key = measurement_key(blueprint, directory, device)
    programs = machine.OtherPrograms()
    effort = Effort(until=time.perf_counter() + MOST_SECONDS)
    speeds = replace(
        take_speeds(blueprint, directory, gpus_with(device), effort),
        measured_at=time.time(),
        cpu=machine.cpu_name(),
        directory=str(machine.nearest_existing(directory)),
        is_busy=programs.share() > BUSY,
    )
    if speeds.disk_idle is not None:
        _save("machines", key, asdict(speeds))
    for card, card_speeds in zip(gpus_with(device), speeds.gpus, strict=True):
        _save("gpus", _gpu_key(card), asdict(card_speeds))
    return speeds


@torch.inference_mode()
def take_speeds(
    blueprint: Blueprint, directory: Path, gpus: Sequence[torch.device], effort: Effort
) -> MachineSpeeds:
    """Return the speeds for a model of this shape, on the CPU and on `gpus`.

    If no model is in `directory`, a file without a name is written.
    """
    # The CPU is measured even if a GPU computes, because it computes experts that are in RAM.
    stride = blueprint.expert.stride
    experts = ExpertTimer(blueprint, effort)
    seconds = experts.seconds()
    size = max(4 * stride, effort.file_bytes)
    disk = measure_disk(directory, stride, size, experts.compute_next, effort.seconds, effort.until)
    return MachineSpeeds(
        disk and disk.busy,
        disk and disk.idle,
        expert_seconds=seconds,
        layer_seconds=experts.mean_of(layer_probe(blueprint)),
        gpus=tuple(map(measure_gpu, gpus)),
    )


def measurement_key(blueprint: Blueprint, directory: Path, device: torch.device) -> str:
    """Return all that a measurement depends on, as a line."""
    expert = blueprint.expert
    forms = blueprint.expert_forms
    mixed = [f"{blueprint.mean_expert} on average"] if len(forms) > 1 else []
    gate_up = expert.gate_up
    layers = blueprint.layer_forms
    gpus = [gpu.name(device) for device in gpus_with(device)]
    return "; ".join(
        (
            f"{machine.cpu_name()} ({torch.backends.cpu.get_cpu_capability()})",
            f"{machine.usable_cores()} cores, {torch.get_num_threads()} threads",
            f"torch {torch.__version__}",
            f"kernels {KERNELS}",
            f"{device}: {', '.join(gpus) or 'no GPU'}",
            f"disk {machine.nearest_existing(directory).stat().st_dev}",
            f"experts {gate_up.rows}x{gate_up.columns} {gate_up.quant_type} {gate_up.dtype} "
            f"{expert.stride}",
            *mixed,
            *(f"{count} layers of {_shapes(blueprint, layer)}" for layer, count in layers.items()),
        )
    )


def _shapes(blueprint: Blueprint, layer: int) -> str:
    matrices = blueprint.dense_matrices(layer)
    return " ".join(f"{spec.rows}x{spec.columns} {spec.quant_type}" for spec in matrices)


def measurement_file() -> Path:
    """Return the file that remembers measurements."""
    return data_dir() / "machine.json"


def _save(section: str, key: str, entry: dict[str, Any]) -> None:
    """Save an entry of "machines" or "gpus", and drop the oldest ones."""
    path = measurement_file()
    # They are read only now, since another process may have measured meanwhile.
    sections = {name: _read(name) for name in _SECTIONS}
    entries = sections[section]
    entries.pop(key, None)
    newest = [*entries.items()][1 - _MAX_ENTRIES :]
    sections[section] = dict([*newest, (key, entry)])
    content = json.dumps({"format": _FORMAT, **sections}, indent=1)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_private_file(path, content.encode())


def _read(section: str) -> dict[str, Any]:
    """Return the entries of a section, none if the file is missing, damaged or of another form."""
    try:
        content = read_json_object(measurement_file(), follow=False)
    except CheckpointError:
        return {}
    entries = content.get(section)
    return entries if content.get("format") == _FORMAT and isinstance(entries, dict) else {}
