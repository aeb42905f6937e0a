"""What this machine is, and what it has to spare: processor, memory and disk."""

from __future__ import annotations

import os
import platform
import shutil
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_CPU_INFO = Path("/proc/cpuinfo")


def cpu_name() -> str:
    """The processor's own name, as far as the system knows it."""
    try:
        for line in _CPU_INFO.read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Count of cores that this process may run on, or have the time of."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quota = cgroup_cores(_CGROUPS)
    return cores if quota is None else min(cores, quota)


def cgroup_cores(directory: Path) -> int | None:
    """Cores whose time a container may use (cgroup v2), rounded up; None without a limit."""
    try:
        quota, period = (directory / "cpu.max").read_text().split()
        return None if quota == "max" else max(1, -(-int(quota) // int(period)))
    except (OSError, ValueError, ZeroDivisionError):
        return None


def total_memory() -> int:
    """Bytes of RAM, used or not; no more than a container may have."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(whole, int((_CGROUPS / "memory.max").read_text()))
    except (OSError, ValueError):  # no container, or one without a limit
        return whole


def free_memory() -> int:
    """Bytes of RAM that can be taken without pushing anything out."""
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        # macOS says only how much there is in all; half of that is a cautious guess.
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    room = cgroup_room(_CGROUPS)
    return free if room is None else min(free, room)


def cgroup_room(directory: Path) -> int | None:
    """Bytes left of a container's limit (cgroup v2), None where there is no limit.

    Pages of files that were read but are not in use count as free: the kernel drops them first.
    """
    try:
        limit = (directory / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((directory / "memory.current").read_text())
        stat = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
        return max(0, int(limit) - used + int(stat["inactive_file"]))
    except (OSError, KeyError, ValueError):
        return None


def existing(directory: Path) -> Path:
    """The directory, or the nearest one above it that is there."""
    return next(place for place in (directory, *directory.parents) if place.exists())


def free_disk(directory: Path) -> int:
    """Bytes that can be written below `directory`, which need not be there yet."""
    return shutil.disk_usage(existing(directory)).free


def same_disk(one: Path, other: Path) -> bool:
    """Whether both directories, which need not be there yet, are on one disk."""
    return existing(one).stat().st_dev == existing(other).stat().st_dev


def disk_usage(path: Path) -> int:
    """Bytes that a file, or the files below a directory, take; holes and links take nothing."""
    if path.is_symlink() or not path.exists():
        return 0
    if path.is_file():
        return path.stat().st_blocks * 512
    total = 0
    for parent, _, names in os.walk(path):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_blocks * 512
            except OSError:
                continue
    return total
