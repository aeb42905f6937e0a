"""Chooses how many threads torch uses, and measures possible counts once, on a quiet machine."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from mixchat.base import machine
from mixchat.base.errors import CheckpointError
from mixchat.base.files import read_json_object, write_private_file
from mixchat.base.settings import data_dir
from mixchat.kernels.cpu.compile import KERNELS
from mixchat.planning.compute_speed import thread_seconds
from mixchat.planning.machine_speeds import BUSY, BUSY_LIFETIME_S
from mixchat.weights.format.blueprint import Blueprint

# A later count has to be 1.05 times as fast, because measurements vary by some percent, and another
# count of threads rounds differently.
_MIN_GAIN = 1.05

Measure = Callable[[Sequence[int]], Mapping[int, float]]  # seconds by count


def choose_threads(blueprint: Blueprint) -> None:
    """Let torch use the best count of threads for a model of this shape."""
    physical = _torch_default()
    if os.environ.get("OMP_NUM_THREADS"):  # set by a person
        return
    config = blueprint.config
    used = blueprint.quantization
    shape = (
        f"layers of {config.hidden_size} columns with {config.num_attention_heads} heads in "
        f"{used.attention}, {config.num_experts_per_tok} experts of {config.intermediate_size} in "
        f"{used.quant_type}"
    )
    counts = candidates(physical, machine.usable_cores())
    measure = functools.partial(thread_seconds, blueprint)
    torch.set_num_threads(known_or_best(data_dir() / "threads.json", shape, counts, measure))


@functools.cache
def _torch_default() -> int:
    """Return torch's threads before another count is set."""
    return torch.get_num_threads()


def candidates(physical: int, usable: int) -> list[int]:
    """Return the counts worth a try, the preferred ones first.

    One thread never waits for a thread whose core another program has taken. Torch's default is the
    count of `physical` cores. More threads are `usable` if a core runs two. A container may get
    less time than its cores have. With 8 cores of two threads the counts are 1, 8, 16, 6.
    """
    counts = [1, min(physical, usable), usable]
    if physical >= 4:
        counts.append(min(physical * 3 // 4, usable))
    return list(dict.fromkeys(counts))


def known_or_best(path: Path, shape: str, counts: Sequence[int], measure: Measure) -> int:
    """Return the count that `path` has for this machine, else the best by `measure`, saved there.

    It measures only once for a shape, because other counts may round differently. If other programs
    took the cores meanwhile, the count is saved for some minutes. They can make one thread seem
    best, which halves the speed once they have ended.
    """
    if len(counts) == 1:
        return counts[0]
    tried = ", ".join(map(str, counts))
    key = f"{machine.cpu_name()}; kernels {KERNELS}; of {tried} threads; {shape}"
    saved: dict[str, object] = {}
    with contextlib.suppress(CheckpointError):
        saved = read_json_object(path, follow=False)
    match saved.get(key):
        case int(count) if count in counts:
            return count
        case [int(count), int(until)] if count in counts:
            if 0 < until - time.time() <= BUSY_LIFETIME_S:
                return count
    programs = machine.OtherPrograms()
    seconds = measure(counts)
    best = counts[0]
    for count in counts[1:]:
        if seconds[count] * _MIN_GAIN < seconds[best]:
            best = count
    is_busy = programs.share() > BUSY
    entry = [best, int(time.time()) + BUSY_LIFETIME_S] if is_busy else best
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_private_file(path, json.dumps({**saved, key: entry}, indent=1).encode())
    return best
