"""What this machine is, and what it has to spare: processor, memory and disk."""

from __future__ import annotations

import os
import platform
import resource
import shutil
from pathlib import Path

from mixchat import cgroups

_CPU_INFO = Path("/proc/cpuinfo")
_MEMORY_INFO = Path("/proc/meminfo")
_PAGES = Path("/proc/self/statm")


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
    quota = cgroups.cores()
    return cores if quota is None else min(cores, quota)


def total_memory() -> int:
    """Bytes of RAM, used or not; no more than the process's control groups may have."""
    whole = _installed_memory()
    limit = cgroups.memory_limit()
    return whole if limit is None else min(whole, limit)


def free_memory() -> int:
    """Bytes of RAM that can be taken without pushing anything out, and within all limits."""
    return min(_free_by_limit().values())


def memory_limit() -> str | None:
    """The limit that leaves less memory than the machine has free; None where none does.

    It is "control group", which a container, systemd or a batch system sets, or a `ulimit`.
    """
    free = _free_by_limit()
    tightest = min(free, key=free.__getitem__)
    return tightest or None


def _free_by_limit() -> dict[str, int]:
    """Bytes that each limit leaves, by its name; "" is the machine itself."""
    free = {"": _available_memory()}
    room = cgroups.memory_room()
    if room is not None:
        free["control group"] = room
    return free | room_by_ulimit()


def _available_memory() -> int:
    try:
        fields = dict(line.split(":", 1) for line in _MEMORY_INFO.read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        # macOS says only how much there is in all; half of that is a cautious guess.
        return _installed_memory() // 2


def _installed_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def room_by_ulimit() -> dict[str, int]:
    """Bytes left of the limits that a shell or a batch system has set for each process."""
    try:
        pages = [int(field) for field in _PAGES.read_text().split()]  # see proc_pid_statm(5)
    except OSError:  # no Linux
        return {}
    limits = (("ulimit -v", resource.RLIMIT_AS, 0), ("ulimit -d", resource.RLIMIT_DATA, 5))
    left: dict[str, int] = {}
    for name, kind, field in limits:
        limit, _ = resource.getrlimit(kind)
        if limit != resource.RLIM_INFINITY:
            left[name] = max(0, limit - pages[field] * os.sysconf("SC_PAGE_SIZE"))
    return left


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
