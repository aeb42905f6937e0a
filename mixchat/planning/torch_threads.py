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

_MIN_GAIN = 1.05  # times the speed of a count that comes before

Measure = Callable[[Sequence[int]], Mapping[int, float]]  # seconds by count


def choose_threads(blueprint: Blueprint) -> None:
    """Let torch use the best count of threads for a model of this shape."""
    physical = _cores()
    if os.environ.get("OMP_NUM_THREADS"):  # set by a person
        return
    counts = candidates(physical, machine.usable_cores())
    measure = functools.partial(thread_seconds, blueprint)
    path = data_dir() / "threads.json"
    torch.set_num_threads(known_or_best(path, _shape_of(blueprint), counts, measure))


@functools.cache
def _cores() -> int:
    """Return torch's threads until another count is set."""
    return torch.get_num_threads()


def _shape_of(blueprint: Blueprint) -> str:
    config, used = blueprint.config, blueprint.quantization
    return (
        f"layers of {config.hidden_size} columns with {config.num_attention_heads} heads in "
        f"{used.attention}, {config.num_experts_per_tok} experts of {config.intermediate_size} in "
        f"{used.quant_type}"
    )


def candidates(physical: int, usable: int) -> list[int]:
    """Return the counts worth a try, the preferred ones first.

    One thread never waits for another, which another program may keep from its core. Torch's own
    count is the number of `physical` cores. With two threads a core, more are `usable`. A container
    may get less time than its cores have. With 8 cores of two threads the counts are 1, 8, 16, 6.
    """
    counts = [1, min(physical, usable), usable]
    if physical >= 4:
        counts.append(min(physical * 3 // 4, usable))
    return list(dict.fromkeys(counts))


def known_or_best(path: Path, shape: str, counts: Sequence[int], measure: Measure) -> int:
    """Return the count that `path` has for this machine, else the best by `measure`, saved there.

    It measures only once for a shape, because other counts may round differently.
    """
    if len(counts) == 1:
        return counts[0]
    tried = ", ".join(map(str, counts))
    key = f"{machine.cpu_name()}; kernels {KERNELS}; of {tried} threads; {shape}"
    saved = _read(path)
    if saved.get(key) in counts:
        return cast("int", saved[key])
    best = _best(counts, measure(counts))
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_private_file(path, json.dumps({**saved, key: best}, indent=1).encode())
    return best


def _best(counts: Sequence[int], seconds: Mapping[int, float]) -> int:
    best = counts[0]
    for count in counts[1:]:
        if seconds[count] * _MIN_GAIN < seconds[best]:
            best = count
    return best


def _read(path: Path) -> dict[str, object]:
    try:
        return read_json_object(path, follow=False)
    except CheckpointError:
        return {}
