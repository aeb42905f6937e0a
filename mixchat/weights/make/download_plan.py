"""The plan of a download: the bytes, disk, memory and time that it will take."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mixchat.base import machine
from mixchat.base.errors import ResourceError
from mixchat.base.quantities import format_least, format_size
from mixchat.weights.format.blueprint import Blueprint
from mixchat.weights.format.file_layout import file_layouts
from mixchat.weights.make.build import Remaining, find_remaining
from mixchat.weights.make.parts import Part, parts
from mixchat.weights.make.quantize_options import rounded_from
from mixchat.weights.source.checkpoint import Checkpoint
from mixchat.weights.source.checkpoint_index import CheckpointIndex, expert_tensor

# The process with torch in it, before it has touched a weight.
_BASE_MEMORY = 400_000_000
_SMALL_FILES = 16_000_000  # manifest, journal, tokenizer
_SAMPLE = (1024, 4096)
_COPY_RATE = 5e8  # weights a second: the most that are read, hashed and written


@dataclass(frozen=True)
class Need:
    """The bytes needed in a place, and the bytes free there."""

    place: Path
    needed: int
    free: int

    @property
    def suffices(self) -> bool:
        """Return whether there is as much free as is needed."""
        return self.needed <= self.free


@dataclass(frozen=True)
class DownloadPlan:
    """The plan of a download. Sizes in bytes, `rate` in bytes a second, `seconds` in all.

    `checkpoint` is the size of the checkpoint's weights, `fetch` the bytes of it still missing,
    `installed` the size of the installed weights. `disk` is the most that is needed at once, beyond
    what is there. `remaining`: the work that is left. `ahead`: the disk has room to fetch a shard
    while another one is quantized. `rounded_from`: the type of weights ("fp16") that are rounded
    to bf16, if any are.
    """

    name: str
    target: Path
    source: str
    commit: str | None
    quantization: Mapping[str, object]
    checkpoint: int
    fetch: int
    installed: int
    disk: tuple[Need, ...]
    memory: Need
    remaining: Remaining
    ahead: bool = True
    rate: float | None = None
    seconds: float | None = None
    rounded_from: str | None = None

    @property
    def fits(self) -> bool:
        """Return whether disk and memory suffice."""
        return all(need.suffices for need in (*self.disk, self.memory))

    def check(self) -> None:
        """Raise `ResourceError`, with the bytes needed and free, where disk or memory is short."""
        for need in self.disk:
            if not need.suffices:
                raise ResourceError(
                    f"not enough disk in {need.place}: {format_least(need.needed)} needed, "
                    f"{format_size(need.free)} free",
                    hint="Free some space, or set MIXCHAT_HOME (models) or HF_HOME (the hub's "
                    "cache) to a directory on a larger disk.",
                )
        if not self.memory.suffices:
            raise ResourceError(
                f"not enough memory: {format_least(self.memory.needed)} needed, "
                f"{format_size(self.memory.free)} free",
                hint="Close other programs.",
            )


def make_plan(
    target: Path, checkpoint: Checkpoint, blueprint: Blueprint, free_disk: int | None = None
) -> DownloadPlan:
    """Make the plan for the model `blueprint` of `checkpoint` in the directory `target`.

    free_disk: as for `find_disk_needs`.
    """
    index, remaining = checkpoint.index, find_remaining(checkpoint, target, blueprint)
    fetch = sum(checkpoint.missing(shard) for shard in remaining.shards)
    elsewhere = [(checkpoint.cache, fetch)] if checkpoint.cache else []
    disk, ahead = find_disk_needs(
        target, index, blueprint, checkpoint.temporary, elsewhere, free_disk
    )
    return DownloadPlan(
        name=target.name,
        target=target,
        source=checkpoint.source.repo,
        commit=checkpoint.source.commit,
        quantization=blueprint.quantization.description(),
        checkpoint=checkpoint.size,
        fetch=fetch,
        installed=weights_size(blueprint),
        disk=disk,
        memory=find_memory_need(index, blueprint),
        remaining=remaining,
        ahead=ahead,
        rounded_from=rounded_from(index, blueprint),
    )


def estimate_time(
    plan: DownloadPlan, checkpoint: Checkpoint, blueprint: Blueprint, *, keep: bool
) -> DownloadPlan:
    """Return the plan with its time, by fetching for a second; with `keep`, those bytes stay."""
    rate = checkpoint.rate(plan.remaining.shards, keep=keep)
    if rate is None and plan.fetch:
        return plan
    fetching = plan.fetch / rate if rate else 0
    share = sum(part.nbytes for part in plan.remaining.parts) / plan.installed
    quantizing = share * _quantizing_seconds(checkpoint.index, blueprint)
    seconds = max(fetching, quantizing) if plan.ahead else fetching + quantizing
    return replace(plan, rate=rate, seconds=seconds)


def find_disk_needs(
    target: Path,
    index: CheckpointIndex,
    blueprint: Blueprint,
    temporary: Callable[[str], int],
    elsewhere: Sequence[tuple[Path, int]] = (),
    free_disk: int | None = None,
) -> tuple[tuple[Need, ...], bool]:
    """Return the need of each disk beyond what is in `target`, and whether there is room to fetch
    ahead; without that room, less is needed. `temporary` is as for `estimate_peak_disk`. free_disk:
    the free bytes of another machine's disks, which hold nothing of the model yet."""
    here = machine.disk_usage(target) if free_disk is None else 0

    def needs(ahead: bool) -> tuple[Need, ...]:
        peak = estimate_peak_disk(index, blueprint, temporary, ahead=ahead)
        found = add_up_needs((target, max(0, peak - here)), *elsewhere)
        return found if free_disk is None else tuple(replace(n, free=free_disk) for n in found)

    ahead = all(need.suffices for need in needs(True))
    return needs(ahead), ahead


def add_up_needs(*needed: tuple[Path, int]) -> tuple[Need, ...]:
    """Return the need of each disk: the bytes of places on the same disk are added up."""
    found: list[Need] = []
    for place, size in needed:
        for number, need in enumerate(found):
            if machine.same_disk(need.place, place):
                found[number] = Need(need.place, need.needed + size, need.free)
                break
        else:
            found.append(Need(place, size, machine.free_disk(place)))
    return tuple(found)


def weights_size(blueprint: Blueprint) -> int:
    """Return the bytes of the files of weights of the installed model."""
    return sum(layout.size for layout in file_layouts(blueprint).values())


def estimate_peak_disk(
    index: CheckpointIndex,
    blueprint: Blueprint,
    temporary: Callable[[str], int],
    *,
    ahead: bool = True,
) -> int:
    """Return the most bytes on disk during a build: model, spilled tensors and fetched shards.

    `temporary` gives the bytes that a shard takes until it is released. Shards come in their order;
    `ahead`: while one is quantized, the next one is fetched.
    """
    place = {shard: number for number, shard in enumerate(index.shards)}
    written = [0] * len(place)
    # The bytes spilled of a shard, and until which shard: the spill file stays until then.
    spilled, until = [0] * len(place), [0] * len(place)
    for part in parts(blueprint):
        where = {name: place[index.shard_of(name)] for name in part.components(index)}
        last = max(where.values())
        written[last] += part.nbytes
        for name, first in where.items():
            if first < last:
                spilled[first] += index.nbytes([name])
                until[first] = max(until[first], last)
    peak = total = 0
    for number in range(len(place)):
        total += written[number]
        fetched = sum(temporary(shard) for shard in index.shards[number : number + 1 + ahead])
        held = sum(spilled[n] for n in range(number + 1) if number <= until[n])
        peak = max(peak, total + fetched + held)
    return peak + _SMALL_FILES


def find_memory_need(index: CheckpointIndex, blueprint: Blueprint) -> Need:
    """Return the bytes of memory that quantizing the largest part takes, and those free."""
    most = max(_part_memory(part, index) for part in parts(blueprint))
    return Need(Path(), _BASE_MEMORY + most, machine.free_memory())


def _part_memory(part: Part, index: CheckpointIndex) -> int:
    """Return the bytes of a part and, while it is made, of its matrices: one at a time."""
    sources = [index.nbytes(index.components(name)) for name in part.sources]
    stacked = 0
    if part.linear is not None:
        dense = part.linear.rows * part.linear.columns * part.linear.dtype.itemsize
        rounded = part.linear.quant_type == "int8" and sources != [dense]  # to bf16, before
        stacked = dense if rounded or len(sources) > 1 else 0
    if part.linear is None or part.linear.quant_type == "none":
        same_type = sum(sources) == part.nbytes  # then it is not copied
        return stacked + max(sources) + (0 if same_type else part.nbytes)
    return stacked + max(sources) + 2 * part.nbytes


def _quantizing_seconds(index: CheckpointIndex, blueprint: Blueprint) -> float:
    """Return how many seconds this machine quantizes all experts, by trying some weights."""
    layout = blueprint.expert
    weights = layout.w13.rows * layout.w13.columns + layout.w2.rows * layout.w2.columns
    spec = replace(layout.w2, rows=_SAMPLE[0], columns=_SAMPLE[1])
    if index.quant_type(expert_tensor(0, 0, "w1")):
        spec = replace(spec, quant_type="none")  # 4-bit codes are copied, or nearly so
    sample = torch.randn(_SAMPLE, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    spec.encode(sample)  # the first time, code is loaded: not counted
    start = time.perf_counter()
    spec.encode(sample)
    rate = sample.numel() / (time.perf_counter() - start)
    return weights * blueprint.expert_count / min(rate, _COPY_RATE)
