"""The processor, memory and disk of this machine, and their free share."""

from __future__ import annotations

import os
import platform
import shutil
import time
from contextlib import suppress
from pathlib import Path

from mixchat.base import cgroups
from mixchat.base.held_files import hold_from_now_on, read_text

_CPU_INFO = Path("/proc/cpuinfo")
_MEMORY_INFO = Path("/proc/meminfo")
_BLOCK = 512  # bytes, of `st_blocks`, which leaves out a file's holes


def cpu_name() -> str:
    """Return the name of the processor."""
    try:
        for line in _CPU_INFO.read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Return the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    # A container with a quota sees all cores, but gets only a part of their time.
    quota = cgroups.cores()
    return cores if quota is None else min(cores, quota)


class OtherPrograms:
    """The time that other programs take of the cores, from now on."""

    def __init__(self) -> None:
        self._start = _times()

    def share(self) -> float:
        """Return their share of the cores' time so far, 0 to 1, or 0 if not known."""
        taken, idle, own = (now - then for now, then in zip(_times(), self._start, strict=True))
        whole = taken + idle
        return max(taken - own, 0.0) / whole if whole > 0 else 0.0


def _times() -> tuple[float, float, float]:
    """Return the seconds in which the cores worked, idled, and worked for this process."""
    import psutil

    try:
        times = psutil.cpu_times()._asdict()
    except OSError:  # a sandbox without /proc/stat
        return 0.0, 0.0, 0.0
    idle = times.pop("idle") + times.pop("iowait", 0.0)
    # The user's time includes a guest's.
    working = sum(seconds for name, seconds in times.items() if not name.startswith("guest"))
    return working, idle, time.process_time()


def total_memory() -> int:
    """Return the bytes of RAM, within the limits of control groups."""
    whole, _ = _memory()
    limit = cgroups.memory_limit()
    return whole if limit is None else min(whole, limit)


def free_memory() -> int:
    """Return the bytes of RAM that can be allocated without swapping."""
    return min(_free_by_limit().values())


def survive_without_descriptors() -> None:
    """Let `free_memory` be asked from now on although no descriptor is left."""
    hold_from_now_on()
    with suppress(OSError):
        read_text(_MEMORY_INFO)
    free_memory()


def return_freed_memory() -> None:
    """Return freed memory that the C library keeps to the system.

    glibc keeps hundreds of megabytes after a model.
    """
    import ctypes

    # After a model was closed, 430 MB of it still counted as used.
    with suppress(AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def tightest_memory_limit() -> str | None:
    """Return the limit that leaves the least memory, a "control group" or a `ulimit`, or None."""
    free = _free_by_limit()
    tightest = min(free, key=free.__getitem__)
    return tightest or None


def _free_by_limit() -> dict[str, int]:
    """Return the bytes that each limit leaves. "" is the machine itself."""
    _, available = _memory()
    # Under `ulimit -v` a plan with all of the machine's memory failed at loading.
    free = {"": available}
    room = cgroups.memory_room()
    if room is not None:
        free["control group"] = room
    return free | memory_left_by_ulimit()


def _memory() -> tuple[int, int]:
    """Return the bytes of RAM, and how many of them can be allocated."""
    import psutil

    try:
        memory = psutil.virtual_memory()
        return int(memory.total), int(memory.available)
    except OSError:  # strangers' connections have all descriptors
        lines = read_text(_MEMORY_INFO).splitlines()
    kib = {
        name: int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines)
    }
    return 1024 * kib["MemTotal"], 1024 * kib["MemAvailable"]


def memory_left_by_ulimit() -> dict[str, int]:
    """Return the bytes that each `ulimit` leaves on Linux, by its name."""
    import psutil

    if not hasattr(psutil, "RLIMIT_AS"):
        return {}
    try:
        process = psutil.Process()
        used = process.memory_info()
        limits = {
            "ulimit -v": (process.rlimit(psutil.RLIMIT_AS)[0], used.vms),
            "ulimit -d": (process.rlimit(psutil.RLIMIT_DATA)[0], used.data),
        }
    except (OSError, psutil.Error):  # a sandbox without /proc
        return {}
    return {
        name: max(0, limit - taken)
        for name, (limit, taken) in limits.items()
        if limit != psutil.RLIM_INFINITY
    }


def nearest_existing(directory: Path) -> Path:
    """Return the nearest directory, from this one up, that exists."""
    return next(path for path in (directory, *directory.parents) if path.exists())


def free_disk(directory: Path) -> int:
    """Return the bytes that can be written in `directory`, which need not exist yet."""
    return shutil.disk_usage(nearest_existing(directory)).free


def same_disk(first: Path, second: Path) -> bool:
    """Return whether both directories, which need not exist yet, are on one disk."""
    return nearest_existing(first).stat().st_dev == nearest_existing(second).stat().st_dev


def disk_usage(path: Path) -> int:
    """Return the bytes that a file, or all files in a directory, use on disk."""
    if path.is_symlink() or not path.exists():
        return 0
    if path.is_file():
        return path.stat().st_blocks * _BLOCK
    total = 0
    for parent, _, names in os.walk(path):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_blocks * _BLOCK
            except OSError:
                continue
    return total
