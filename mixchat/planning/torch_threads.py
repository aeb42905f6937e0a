"""Chooses how many threads torch uses, and measures possible counts once."""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch

from mixchat.base import machine
from mixchat.base.errors import CheckpointError
from mixchat.base.files import read_json_object, write_private_file
from mixchat.base.settings import data_dir
from mixchat.kernels.compile import KERNELS
from mixchat.planning.compute_speed import thread_seconds
from mixchat.weights.format.blueprint import Blueprint

# Bytes. Threads gain little from sharing such an expert's matrix (some 50 microseconds), and lose
# ten times as much in waiting if another program wants a core.
SMALL_EXPERT = 4_000_000
_MIN_GAIN = 1.05  # times the speed of torch's own count

Measure = Callable[[Sequence[int]], Mapping[int, float]]  # seconds by count


def choose_threads(blueprint: Blueprint) -> None:
    """Let torch use the best count of threads for a model of this shape."""
    physical = _cores()
    if os.environ.get("OMP_NUM_THREADS"):  # set by a person
        return
    if blueprint.expert.nbytes < SMALL_EXPERT:
        torch.set_num_threads(1)
        return
    counts = candidates(physical, machine.usable_cores())
    measure = functools.partial(thread_seconds, blueprint)
    torch.set_num_threads(known_or_best(data_dir() / "threads.json", counts, measure))


@functools.cache
def _cores() -> int:
    """Return torch's threads until another count is set."""
    return torch.get_num_threads()


def candidates(physical: int, usable: int) -> list[int]:
    """Return the counts worth a try, torch's own first.

    Torch uses as many threads as there are `physical` cores. With two threads a core, more are
    `usable`. A container may get less time than its cores have. With 8 cores of two threads the
    counts are 8, 16 and 6.
    """
    counts = [min(physical, usable), usable]
    if physical >= 4:
        counts.append(min(physical * 3 // 4, usable))
    return list(dict.fromkeys(counts))


def known_or_best(path: Path, counts: Sequence[int], measure: Measure) -> int:
    """Return the count that `path` has for this machine, else the best by `measure`, saved there.

    It measures only once, because other counts may round differently.
    """
    if len(counts) == 1:
        return counts[0]
    key = f"{machine.cpu_name()}; kernels {KERNELS}; of {', '.join(map(str, counts))} threads"
    saved = _read(path)
    if saved.get(key) in counts:
        return cast("int", saved[key])
    best = _best(counts[0], measure(counts))
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_private_file(path, json.dumps({**saved, key: best}, indent=1).encode())
    return best


def _best(first: int, seconds: Mapping[int, float]) -> int:
    fastest = min(seconds, key=seconds.__getitem__)
    return fastest if seconds[fastest] * _MIN_GAIN < seconds[first] else first


def _read(path: Path) -> dict[str, object]:
    try:
        return read_json_object(path, follow=False)
    except CheckpointError:
        return {}
