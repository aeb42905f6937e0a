"""Chooses the devices that compute, and says why it is not a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from mixchat.base import gpu
from mixchat.base.errors import MissingDependencyError, UsageError
from mixchat.base.options import LoadOptions, device_names
from mixchat.base.progress import Note
from mixchat.base.quantities import format_size
from mixchat.experts.memory import CPU
from mixchat.kernels.gpu import toolchain
from mixchat.planning.cards import too_old
from mixchat.planning.fitting import FreeMemory
from mixchat.planning.measuring import estimated_speeds, saved_speeds
from mixchat.planning.plan import fit_on_faster
from mixchat.weights.format.blueprint import Blueprint


@dataclass(frozen=True)
class DeviceChoice:
    """The devices, of which the first computes all but experts.

    reason: why not all GPUs compute, as a sentence, or None.
    """

    devices: list[torch.device]
    reason: str | None = None


def devices_for(
    blueprint: Blueprint, directory: Path, options: LoadOptions, note: Note
) -> list[torch.device]:
    """Return the devices that compute a model. Raises as `usable_devices`.

    If none is named, they are the GPUs or the CPU, whichever decode faster by the plan. The plan
    uses the measured speeds of this machine, or quick estimates. `note` gets the reason for the
    CPU.
    """
    choice = usable_devices(options.device)
    if gpu.is_gpu(choice.devices[0]) and is_free_to_choose(options):
        first = choice.devices[0]
        known = saved_speeds(blueprint, directory, first)
        speeds = known or estimated_speeds(blueprint, choice.devices)
        free = FreeMemory.now(choice.devices)
        _, reason = fit_on_faster(blueprint, free, options, speeds)
        if reason is not None:
            choice = DeviceChoice([CPU], on_cpu_because(gpu.name(first), reason))
    if choice.reason is not None:
        note(choice.reason)
    return choice.devices


def note_excess(options: LoadOptions, memory: int, note: Note) -> None:
    """Note that experts may take more RAM than the `memory` bytes that there are."""
    size = None if options.host_memory is None else options.host_memory.size
    if size is not None and size > memory:
        note(f"--host-memory {format_size(size)}: there are only {format_size(memory)} of RAM")


def is_free_to_choose(options: LoadOptions) -> bool:
    """Return whether nobody asked for a GPU, or for the CPU."""
    return options.device is None and not options.device_memory


def on_cpu_because(name: str, reason: str) -> str:
    """Return a sentence that says why a GPU does not compute."""
    return f"the CPU computes, not {name}: {reason}"


def usable_devices(text: str | None) -> DeviceChoice:
    """Return the named devices, else all usable GPUs, else the CPU.

    Raises `UsageError` if a named device is missing or too old, and `MissingDependencyError` if
    kernels cannot be started on it.
    """
    named = (gpu.KIND if gpu.count() else "cpu") if text is None else text
    names = device_names(named)
    devices = [_device(name) for name in names]
    if names == [gpu.KIND]:
        devices = [torch.device(gpu.KIND, number) for number in range(gpu.count())]
    if len(devices) > 1 and not all(map(gpu.is_gpu, devices)):
        raise UsageError(f"--device {text!r}: only GPUs compute together; use cpu or cuda")
    if not gpu.is_gpu(devices[0]):
        return DeviceChoice(devices)
    old = {device: why for device in devices if (why := too_old(gpu.capability(device)))}
    usable = [device for device in devices if device not in old]
    lacking = toolchain.missing()
    if text is None and (lacking or not usable):
        why = lacking or old[devices[0]]
        return DeviceChoice([CPU], on_cpu_because(gpu.name(devices[0]), why))
    if old and (not usable or names != [gpu.KIND]):
        device, why = next(iter(old.items()))
        raise UsageError(
            f"--device {text!r}: {gpu.name(device)} cannot be used: {why}",
            hint="Leave --device out, to compute on the CPU.",
        )
    if lacking:
        raise MissingDependencyError(f"--device {text!r}: {lacking}")
    gpu.use(usable[0])  # streams and events belong to the current one
    reasons = [f"{gpu.name(device)} is not used: {why}" for device, why in old.items()]
    return DeviceChoice(usable, "; ".join(reasons) or None)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name!r} is not a device; use cpu or cuda") from None
    if device.type not in ("cpu", gpu.KIND):
        raise UsageError(f"--device {name!r} is not supported; use cpu or cuda")
    last = gpu.count() - 1
    if not gpu.is_gpu(device):
        return CPU  # to torch "cpu:0" is another device than "cpu"
    # Torch takes numbers from 128 on for negative ones.
    if 0 <= (device.index or 0) <= last:
        return device
    if last < 0:
        reason = "" if torch.version.cuda else ", because this PyTorch is built for CPUs alone"
        raise UsageError(
            f"--device {name!r}: torch sees no GPU here{reason}",
            hint="Leave --device out, to compute on the CPU.",
        )
    usable = f"{gpu.KIND}:0" + (f" to {gpu.KIND}:{last}" if last else "")
    raise UsageError(
        f"--device {name!r}: torch sees {last + 1} GPU{'s' if last else ''} here",
        hint=f"Use {usable}, or leave --device out.",
    )
