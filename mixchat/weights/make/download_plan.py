"""What a download will take, known before the first byte: bytes, disk, memory, time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mixchat import machine
from mixchat.errors import ResourceError
from mixchat.quantities import format_least, format_size
from mixchat.weights.format.blueprint import Blueprint
from mixchat.weights.format.file_layout import layouts
from mixchat.weights.make.build import remaining
from mixchat.weights.make.parts import Part, parts
from mixchat.weights.make.quantize import rounded_from
from mixchat.weights.source.index import SourceIndex, expert_tensor
from mixchat.weights.source.origin import Origin

# The process with torch in it, before it has touched a weight.
_BASE_MEMORY = 400_000_000
_SMALL_FILES = 16_000_000  # manifest, journal, tokenizer
_SAMPLE = (1024, 4096)
_COPY_RATE = 5e8  # weights a second that are read, hashed and written at best


@dataclass(frozen=True)
class Need:
    """Bytes needed in a place, and bytes free there."""

    place: Path
    needed: int
    free: int

    @property
    def suffices(self) -> bool:
        """Return whether there is as much free as is needed."""
        return self.needed <= self.free


@dataclass(frozen=True)
class DownloadPlan:
    """What a download takes. Sizes in bytes, `rate` in bytes a second, `seconds` for all of it.

    `checkpoint` is the size of the weights at the source, `fetch` what of them is still to come,
    `kept` the finished model's. `disk` is the most that will be taken at once beyond what is there.
    `ahead`: whether the disk has room to fetch a shard while the one before is quantized.
    `rounded_from`: the type of weights ("fp16") that are rounded to bf16, if they are.
    """

    name: str
    target: Path
    source: str
    commit: str | None
    quantization: Mapping[str, object]
    checkpoint: int
    fetch: int
    kept: int
    disk: tuple[Need, ...]
    memory: Need
    ahead: bool = True
    rate: float | None = None
    seconds: float | None = None
    rounded_from: str | None = None

    @property
    def fits(self) -> bool:
        """Whether disk and memory suffice."""
        return all(need.suffices for need in (*self.disk, self.memory))

    def check(self) -> None:
        """Raise `ResourceError`, with what is needed and what there is, where it cannot fit."""
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


def plan_of(
    name: str, target: Path, origin: Origin, blueprint: Blueprint, cache: Path | None
) -> DownloadPlan:
    """The plan for the checkpoint of `origin`; `cache` is where its shards stay, if they do."""
    index = origin.index
    fetch = sum(origin.missing(shard) for shard in remaining(origin, target, blueprint).shards)
    elsewhere = [(cache, fetch)] if cache else []
    disk, ahead = disk_needs(target, index, blueprint, origin.temporary, elsewhere)
    return DownloadPlan(
        name=name,
        target=target,
        source=origin.source.repo,
        commit=origin.source.commit,
        quantization=blueprint.quantization.description(),
        checkpoint=sum(index.header(shard).size for shard in index.shards),
        fetch=fetch,
        kept=installed_size(blueprint),
        disk=disk,
        memory=memory_need(index, blueprint),
        ahead=ahead,
        rounded_from=rounded_from(index, blueprint),
    )


def with_time(
    plan: DownloadPlan, origin: Origin, blueprint: Blueprint, *, keep: bool
) -> DownloadPlan:
    """The plan with an estimate of its time; what is fetched for it is kept if `keep`."""
    left = remaining(origin, plan.target, blueprint)
    rate = origin.rate(left.shards, keep=keep)
    if rate is None and plan.fetch:
        return plan
    fetching = plan.fetch / rate if rate else 0
    share = sum(part.nbytes for part in left.parts) / plan.kept
    quantizing = share * _quantizing_seconds(origin.index, blueprint)
    seconds = max(fetching, quantizing) if plan.ahead else fetching + quantizing
    return replace(plan, rate=rate, seconds=seconds)


def disk_needs(
    target: Path,
    index: SourceIndex,
    blueprint: Blueprint,
    temporary: Callable[[str], int],
    elsewhere: Sequence[tuple[Path, int]] = (),
) -> tuple[tuple[Need, ...], bool]:
    """Return the need of each disk beyond what is in `target`, and whether there is room to fetch
    ahead; without such room less is needed. `temporary` as for `peak_disk`."""
    here = machine.disk_usage(target)

    def disk(ahead: bool) -> tuple[Need, ...]:
        peak = peak_disk(index, blueprint, temporary, ahead=ahead)
        return needs((target, max(0, peak - here)), *elsewhere)

    ahead = all(need.suffices for need in disk(True))
    return disk(ahead), ahead


def needs(*wanted: tuple[Path, int]) -> tuple[Need, ...]:
    """What is needed on each disk; places on the same one are added up."""
    found: list[Need] = []
    for place, size in wanted:
        for number, need in enumerate(found):
            if machine.same_disk(need.place, place):
                found[number] = Need(need.place, need.needed + size, need.free)
                break
        else:
            found.append(Need(place, size, machine.free_disk(place)))
    return tuple(found)


def installed_size(blueprint: Blueprint) -> int:
    """Bytes that the files of weights of a kept model take."""
    return sum(layout.size for layout in layouts(blueprint).values())


def peak_disk(
    index: SourceIndex, blueprint: Blueprint, temporary: Callable[[str], int], *, ahead: bool = True
) -> int:
    """The most bytes that a model takes while it is made: what is written, aside and fetched.

    `temporary` gives the bytes that a shard takes until it is released. Shards come in their order;
    `ahead`: while one is quantized, the next one is on its way.
    """
    place = {shard: number for number, shard in enumerate(index.shards)}
    written = [0] * len(place)
    # What is put aside of a shard, and until which one: as a whole, until the last of it is used.
    aside, until = [0] * len(place), [0] * len(place)
    for part in parts(blueprint):
        where = {name: place[index.shard_of(name)] for name in part.components(index)}
        last = max(where.values())
        written[last] += part.nbytes
        for name, first in where.items():
            if first < last:
                aside[first] += index.nbytes([name])
                until[first] = max(until[first], last)
    peak = total = 0
    for number in range(len(place)):
        total += written[number]
        fetched = sum(temporary(shard) for shard in index.shards[number : number + 1 + ahead])
        held = sum(aside[n] for n in range(number + 1) if number <= until[n])
        peak = max(peak, total + fetched + held)
    return peak + _SMALL_FILES


def memory_need(index: SourceIndex, blueprint: Blueprint) -> Need:
    """The most bytes that quantizing takes, those of the largest part, and what is free."""
    most = max(_part_memory(part, index) for part in parts(blueprint))
    return Need(Path(), _BASE_MEMORY + most, machine.free_memory())


def _part_memory(part: Part, index: SourceIndex) -> int:
    """Bytes of the matrices as they are read, one after the other, and of what is made of them."""
    sources = [index.nbytes(index.components(name)) for name in part.sources]
    stacked = 0
    if part.linear is not None and len(sources) > 1:
        stacked = part.linear.rows * part.linear.columns * part.linear.dtype.itemsize
    if part.linear is None or part.linear.quant_type == "none":
        same_type = sum(sources) == part.nbytes  # then it is not copied
        return stacked + max(sources) + (0 if same_type else part.nbytes)
    return stacked + max(sources) + 2 * part.nbytes


def _quantizing_seconds(index: SourceIndex, blueprint: Blueprint) -> float:
    """How long this machine quantizes all experts, by trying some weights."""
    layout = blueprint.expert
    weights = layout.w13.rows * layout.w13.columns + layout.w2.rows * layout.w2.columns
    spec = replace(layout.w2, rows=_SAMPLE[0], columns=_SAMPLE[1])
    if index.quant_type(expert_tensor(0, 0, "w1")):
        spec = replace(spec, quant_type="none")  # taken over: as good as copied
    sample = torch.randn(_SAMPLE, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    spec.encode(sample)  # what is loaded the first time does not count
    began = time.perf_counter()
    spec.encode(sample)
    rate = sample.numel() / (time.perf_counter() - began)
    return weights * blueprint.expert_count / min(rate, _COPY_RATE)
