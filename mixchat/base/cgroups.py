"""The limits of memory and CPU time that control groups set, at every level.

The limits of a process's group and of all groups above it apply. Version 2 has one hierarchy. In
version 1 each controller ("memory", "cpu") may have its own. A machine can have both versions.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from mixchat.base.held_files import read_text

PROCESS = Path("/proc/self")
VERSION_2 = ""  # the hierarchy of version 2


# By controller: the files of the limits and of what is used, and the line of memory.stat with the
# cached pages that are not in use. No limit is a huge number in version 1 and "max" in version 2.
# Above memory.high a process hardly runs.
_MEMORY = {
    "memory": (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
    VERSION_2: (("memory.max", "memory.high"), "memory.current", "inactive_file"),
}


def memory_limit(process: Path = PROCESS) -> int | None:
    """Return the bytes that this process's groups may use, or None."""
    return _least(
        _number(group / name)
        for controller, (names, _, _) in _MEMORY.items()
        for group in groups(process, controller)
        for name in names
    )


def memory_room(process: Path = PROCESS) -> int | None:
    """Return the bytes that are left below every limit, or None.

    Cached pages that are not in use count as free, because the kernel drops them first.
    """
    rooms = []
    for controller, (names, usage, reclaimable) in _MEMORY.items():
        for group in groups(process, controller):
            limit = _least(_number(group / name) for name in names)
            used = _number(group / usage)
            if limit is not None and used is not None:
                stat = dict(line.partition(" ")[::2] for line in _lines(group / "memory.stat"))
                rooms.append(max(0, limit - used + int(stat.get(reclaimable, "0"))))
    return min(rooms, default=None)


def cores(process: Path = PROCESS) -> int | None:
    """Return the cores that the tightest quota of CPU time allows, rounded up, or None."""
    quotas = []
    for group in (*groups(process, "cpu"), *groups(process, VERSION_2)):
        # Version 1 has quota and period in two files, version 2 in one.
        quota = _number(group / "cpu.cfs_quota_us")
        period = _number(group / "cpu.cfs_period_us")
        if pair := re.fullmatch(r"(\d+) (\d+)", "".join(_lines(group / "cpu.max"))):
            quota = int(pair[1])
            period = int(pair[2])
        if quota and period:
            quotas.append(max(1, -(-quota // period)))
    return min(quotas, default=None)


def groups(process: Path, hierarchy: str) -> Iterator[Path]:
    """Yield the directories of the process's group and of each mounted group above it.

    hierarchy: a controller of version 1, or `VERSION_2`.
    """
    # systemd-run and SLURM limit a group above, or below, the one that is mounted.
    path = None
    for line in _lines(process / "cgroup"):  # such as 4:cpu,cpuacct:/a/b
        _, _, membership = line.partition(":")
        names, _, group_path = membership.partition(":")
        if hierarchy in names.split(","):
            path = group_path
    if path is None:
        return
    mounts = list(_mounts(process, hierarchy))
    for root, point in mounts:
        group = point / path.removeprefix(root).lstrip("/")
        below = f"{path}/".startswith(f"{root}/") and ".." not in group.parts
        if below and os.path.isdir(group):
            break
    else:
        if not mounts:
            return
        # In a container only the host may know the path of the group.
        point = group = mounts[0][1]
    yield group
    while group != point:
        group = group.parent
        yield group


def _mounts(process: Path, hierarchy: str) -> Iterator[tuple[str, Path]]:
    """Yield each mounted group and its mount point, as in proc_pid_mountinfo(5)."""
    for line in _lines(process / "mountinfo"):
        mount, _, filesystem = line.partition(" - ")
        fstype, _, options = (*filesystem.split(" ", 2), "", "", "")[:3]
        names = {"cgroup": options.split(","), "cgroup2": [VERSION_2]}.get(fstype, [])
        if hierarchy in names:
            root, point = mount.split(" ")[3:5]
            yield _unescaped(root).rstrip("/"), Path(_unescaped(point))


def _least(numbers: Iterable[int | None]) -> int | None:
    return min((number for number in numbers if number is not None), default=None)


def _number(path: Path) -> int | None:
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdecimal() else None


def _lines(path: Path) -> list[str]:
    try:
        return read_text(path).splitlines()
    except OSError:  # no such controller or file, or no Linux
        return []


def _unescaped(text: str) -> str:
    """Return a path without mountinfo's octal escapes."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
