"""How many threads compute: where there is a choice, that is measured once."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch

from mixchat import machine
from mixchat.errors import CheckpointError
from mixchat.files import read_json_object, write_private_file
from mixchat.kernels.compile import KERNELS
from mixchat.planning.measure import thread_seconds
from mixchat.settings import data_dir
from mixchat.weights.format.blueprint import Blueprint

# Bytes. A matrix of such an expert takes some 50 microseconds: threads gain little from sharing it,
# and lose ten times as much in waiting for each other where another program wants a core too.
SMALL_EXPERT = 4_000_000
_WORTH = 1.05  # how much faster another count than torch's own has to be

Measure = Callable[[Sequence[int]], Mapping[int, float]]  # seconds by count


def settle_threads(blueprint: Blueprint) -> None:
    """Let torch take as many threads as serve a model of this shape, from now on."""
    physical = _cores()
    if os.environ.get("OMP_NUM_THREADS"):  # somebody has said how many
        return
    if blueprint.expert.nbytes < SMALL_EXPERT:
        torch.set_num_threads(1)
        return
    counts = candidates(physical, machine.usable_cores())

    def measure(counts: Sequence[int]) -> Mapping[int, float]:
        return thread_seconds(blueprint, counts)

    torch.set_num_threads(known_or_best(data_dir() / "threads.json", counts, measure))


@functools.cache
def _cores() -> int:
    """How many cores torch sees: as many threads it takes until it is told otherwise."""
    return torch.get_num_threads()


def candidates(physical: int, usable: int) -> list[int]:
    """The counts worth a try, the first of them where nothing is known.

    Torch takes as many threads as there are `physical` cores. A core may run two, which is
    `usable` then; some cores may be too slow to be of help; and a container may get less time than
    its cores have. With 8 cores of two threads: 8, 16, 6.
    """
    counts = [min(physical, usable), usable]
    if physical >= 4:
        counts.append(min(physical * 3 // 4, usable))
    return list(dict.fromkeys(counts))


def known_or_best(path: Path, counts: Sequence[int], measure: Measure) -> int:
    """The count that `path` remembers for this machine, else the best by `measure`, kept there.

    It is not measured at each start: with another count results may be rounded otherwise.
    """
    if len(counts) == 1:
        return counts[0]
    key = f"{machine.cpu_name()}; kernels {KERNELS}; of {', '.join(map(str, counts))} threads"
    kept = _read(path)
    if kept.get(key) in counts:
        return cast("int", kept[key])
    best = _best(counts[0], measure(counts))
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_private_file(path, json.dumps({**kept, key: best}, indent=1).encode())
    return best


def _best(first: int, seconds: Mapping[int, float]) -> int:
    fastest = min(seconds, key=seconds.__getitem__)
    return fastest if seconds[fastest] * _WORTH < seconds[first] else first


def _read(path: Path) -> dict[str, object]:
    try:
        return read_json_object(path, follow=False)
    except CheckpointError:
        return {}
