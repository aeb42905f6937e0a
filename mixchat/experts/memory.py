"""How much memory is free, and how to keep some of it from being moved."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

_CGROUPS = Path("/sys/fs/cgroup")


def free_memory(device: torch.device) -> int:
    """Bytes that can be taken on the device without pushing anything out."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
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


def page_lock(block: torch.Tensor) -> None:
    """Pin the pages of a tensor in RAM, so that copies to a GPU run at the bus's speed.

    `torch.empty(pin_memory=True)` would round 24 GB up to 32. Where the system refuses (WSL2 limits
    it), the tensor stays as it is, and copies are slower but right.
    """
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    runtime.cudaHostRegister(block.data_ptr(), block.nbytes, 0)
