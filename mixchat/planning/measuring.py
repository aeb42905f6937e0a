"""Measures how fast this machine is for a model, and remembers the figures in machine.json."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Sequence
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
from mixchat.planning.bandwidth import MemoryMeter
from mixchat.planning.cards import Card, find_card, too_old
from mixchat.planning.compute_speed import ROWS, SAMPLE_EFFORT, Effort, ExpertTimer, layer_probe
from mixchat.planning.disk_speed import measure_disk
from mixchat.planning.gpu_measuring import measure_gpu
from mixchat.planning.gpu_speeds import GPUSpeeds
from mixchat.planning.machine_speeds import LAYER_START_S, MachineSpeeds, Measurement
from mixchat.weights.format.blueprint import Blueprint

_FORMAT = 6  # of machine.json
SAMPLES = 3  # of a measurement
MOST_SECONDS = 20.0  # unless one try of each figure takes longer
_READ_BYTES = 2**28  # of RAM, for an estimate
_DISK_BANDWIDTH = 2e9  # bytes a second, assumed in an estimate
_MAX_ENTRIES = 32  # because the numbers of some disks change with every start


def saved_measurement(
    blueprint: Blueprint, directory: Path, device: torch.device
) -> Measurement | None:
    """Return the saved measurement for a model of this shape in `directory`."""
    key = measurement_key(blueprint, directory, device)
    return load_measurement(measurement_file(), key, len(gpus_with(device)))


def estimate(blueprint: Blueprint, gpus: Sequence[torch.device]) -> Measurement:
    """Return quick figures of this machine, by the speed of its RAM and the names of its GPUs.

    They take a tenth of a second. They are good enough to choose a device, and are not saved.
    """
    memory = MemoryMeter(CPU, _READ_BYTES).rate()
    expert_s = blueprint.mean_expert / memory
    sample = MachineSpeeds(
        _DISK_BANDWIDTH,
        _DISK_BANDWIDTH,
        _DISK_BANDWIDTH,
        memory_bandwidth=memory,
        expert_seconds={1: expert_s, ROWS[-1]: ROWS[-1] * expert_s},
        layer_seconds=LAYER_START_S + blueprint.mean_layer / memory,
        gpus=tuple(map(_by_name, gpus)),
    )
    return Measurement(time.time(), (sample,), machine.cpu_name())


def _by_name(device: torch.device) -> GPUSpeeds:
    """Return the figures of a GPU's data sheet, or the figures of a cheap GPU."""
    memory = gpu.total_memory(device)
    return GPUSpeeds.of_card(find_card(gpu.name(device), memory) or Card.of_size(memory))


def measure_machine(blueprint: Blueprint, directory: Path, device: torch.device) -> Measurement:
    """Measure this machine, and save the result in place of what was known."""
    key, layer = measurement_key(blueprint, directory, device), layer_probe(blueprint)
    until = time.perf_counter() + MOST_SECONDS
    effort = replace(SAMPLE_EFFORT, until=until)

    def sample() -> MachineSpeeds:
        return take_sample(blueprint, directory, gpus_with(device), layer, effort=effort)

    existing = machine.nearest_existing(directory)
    return measure_and_save(measurement_file(), key, existing, sample, until)


def gpus_with(device: torch.device) -> list[torch.device]:
    """Return a GPU and then this machine's others, none for the CPU."""
    if not gpu.is_gpu(device):
        return []
    first = torch.device(gpu.KIND, device.index or 0)
    more = (torch.device(gpu.KIND, number) for number in range(gpu.count()))
    return [first, *(card for card in more if card != first and not too_old(gpu.capability(card)))]


@torch.inference_mode()
def take_sample(
    blueprint: Blueprint,
    directory: Path,
    gpus: Sequence[torch.device],
    layer: Callable[[], object],
    *,
    effort: Effort = SAMPLE_EFFORT,
) -> MachineSpeeds:
    """Take one sample for a model of this shape, on the CPU and on `gpus`.

    `layer` computes all of a layer but its experts, for one token on the CPU. If no model is in
    `directory`, a file without a name is written.
    """
    # The CPU is measured even if a GPU computes, because it computes experts that are in RAM.
    stride = blueprint.expert.stride
    host = ExpertTimer(blueprint, effort)
    seconds = host.seconds()
    size = max(4 * stride, effort.file_bytes)
    disk = measure_disk(directory, stride, size, host.compute_next, effort.seconds, effort.until)
    busy, idle, fresh = disk or (None, None, None)
    return MachineSpeeds(
        busy,
        idle,
        fresh,
        memory_bandwidth=blueprint.mean_expert / seconds[1],
        expert_seconds=seconds,
        layer_seconds=host.mean_of(layer),
        gpus=tuple(measure_gpu(blueprint, device) for device in gpus),
    )


def measurement_key(blueprint: Blueprint, directory: Path, device: torch.device) -> str:
    """Return all that a measurement depends on, as a line."""
    expert, forms = blueprint.expert, blueprint.expert_forms
    mixed = [f"{blueprint.mean_expert} on average"] if len(forms) > 1 else []
    gate_up, layers = expert.gate_up, blueprint.layer_forms
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


def load_measurement(path: Path, key: str, gpus: int) -> Measurement | None:
    """Return the measurement of `path` under `key`, or None if it is missing or damaged.

    It has the figures of so many GPUs.
    """
    return Measurement.from_dict(_read(path).get(key), gpus)


def measure_and_save(
    path: Path,
    key: str,
    directory: Path,
    sample: Callable[[], MachineSpeeds],
    until: float = math.inf,
) -> Measurement:
    """Take `SAMPLES` samples, and save them in `path` under `key`.

    No sample begins that would end after `until`. A file that cannot be written is ignored. Without
    figures of the disk nothing is saved.
    """
    now, programs = time.time(), machine.OtherPrograms()
    # A virtual machine's speed changes from minute to minute, so one sample says little: one gave
    # 0.99 tokens a second, and others 0.53 to 0.81.
    started, samples = time.perf_counter(), [sample()]
    while len(samples) < SAMPLES:
        each = (time.perf_counter() - started) / len(samples)
        if time.perf_counter() + each > until:
            break
        samples.append(sample())
    share = programs.share()
    measured = Measurement(now, tuple(samples), machine.cpu_name(), str(directory), share)
    if not measured.complete:
        return measured
    entries = _read(path)  # now, since another process may have measured meanwhile
    entries.pop(key, None)
    newest = [*entries.items()][1 - _MAX_ENTRIES :]
    machines = dict([*newest, (key, asdict(measured))])
    content = json.dumps({"format": _FORMAT, "machines": machines}, indent=1)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_private_file(path, content.encode())
    return measured


def _read(path: Path) -> dict[str, Any]:
    """Return the entries of the file, none if it is missing, damaged or of another format."""
    try:
        content = read_json_object(path, follow=False)
    except CheckpointError:
        return {}
    machines = content.get("machines")
    return machines if content.get("format") == _FORMAT and isinstance(machines, dict) else {}
