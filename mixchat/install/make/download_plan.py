"""The plan of a download, with the bytes, disk, memory and time that it takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mixchat.base import machine
from mixchat.base.errors import ResourceError
from mixchat.base.quantities import format_least, format_size
from mixchat.install.make.from_checkpoint import CheckpointBuild
from mixchat.install.make.needs import SMALL_FILES_BYTES, Need, add_up_needs
from mixchat.install.make.parts import ModelPart, model_parts
from mixchat.install.make.quantize_options import rounded_from
from mixchat.install.source.checkpoint_index import CheckpointIndex
from mixchat.weights.format.blueprint import Blueprint
from mixchat.weights.format.workspace import workspace

_PROCESS_BYTES = 400_000_000  # bytes of memory of a process with torch, without weights
_SAMPLE_SHAPE = (1024, 4096)
_SHARD_BYTES_MAX = 5_000_000_000  # of a shard that transformers writes
_WEIGHTS_A_SECOND_MAX = 5e8  # by reading, hashing and writing


@dataclass(frozen=True)
class DownloadPlan:
    """The plan of a download. Sizes are in bytes."""

    name: str
    blueprint: Blueprint
    target: Path
    source: str
    commit: str | None
    quantization: Mapping[str, object]
    checkpoint: int
    fetch: int  # bytes of the checkpoint that are still missing
    installed: int
    disk: tuple[Need, ...]  # the most at once, beyond the bytes that are there
    memory: Need
    ahead: bool = True  # a shard can be fetched while another one is quantized
    rate: float | None = None  # bytes a second
    seconds: float | None = None  # in all
    rounded_from: str | None = None  # the type of weights ("fp16") that are rounded to bf16

    @property
    def fits(self) -> bool:
        return all(need.suffices for need in (*self.disk, self.memory))

    def check(self) -> None:
        """Raise `ResourceError` if disk or memory is short."""
        for need in self.disk:
            need.check()
        if not self.memory.suffices:
            raise ResourceError(
                f"not enough memory: {format_least(self.memory.needed)} needed, "
                f"{format_size(self.memory.free)} free",
                hint="Close other programs.",
            )


def make_plan(build: CheckpointBuild, free_disk: int | None = None) -> DownloadPlan:
    """Make the plan of a build. free_disk: as for `find_disk_needs`."""
    checkpoint = build.checkpoint
    blueprint = build.blueprint
    target = build.target
    fetch = sum(checkpoint.missing(shard) for shard in build.shards)
    caches = [(checkpoint.cache, fetch)] if checkpoint.cache else []
    shards = ShardBytes.of(checkpoint.index, blueprint, checkpoint.temporary)
    disk, ahead = find_disk_needs(target, shards, caches, free_disk)
    return DownloadPlan(
        name=target.name,
        blueprint=blueprint,
        target=target,
        source=checkpoint.source.repo,
        commit=checkpoint.source.commit,
        quantization=blueprint.quantization.description(),
        checkpoint=checkpoint.size,
        fetch=fetch,
        installed=blueprint.size,
        disk=disk,
        memory=find_memory_need(checkpoint.index, blueprint),
        ahead=ahead,
        rounded_from=rounded_from(checkpoint.index, blueprint),
    )


def estimate_time(plan: DownloadPlan, build: CheckpointBuild, *, keep: bool) -> DownloadPlan:
    """Return the plan with its time, by fetching for a second. `keep` keeps those bytes."""
    rate = build.checkpoint.rate(build.shards, keep=keep)
    if rate is None and plan.fetch:
        return plan
    fetching = plan.fetch / rate if rate else 0
    share = sum(part.nbytes for part in build.parts) / plan.installed
    quantizing = share * _quantizing_seconds(build.checkpoint.index, build.blueprint)
    seconds = max(fetching, quantizing) if plan.ahead else fetching + quantizing
    return replace(plan, rate=rate, seconds=seconds)


@dataclass(frozen=True)
class ShardBytes:
    """The bytes that a build puts on disk for each shard of a checkpoint, in the shards' order."""

    fetched: Sequence[int]  # of the shard, until it is released
    written: Sequence[int]  # of the installed model, which the shard completes
    spilled: Sequence[int]  # for parts that need a later shard, too
    until: Sequence[int]  # the number of the shard that completes the last of these parts

    @classmethod
    def of(
        cls, index: CheckpointIndex, blueprint: Blueprint, temporary: Callable[[str], int]
    ) -> ShardBytes:
        """Return the bytes for a checkpoint. `temporary`: as of `Checkpoint`."""
        number_of = {shard: number for number, shard in enumerate(index.shards)}
        written, spilled, until = ([0] * len(number_of) for _ in range(3))
        for part in model_parts(blueprint):
            shards = {name: number_of[index.shard_of(name)] for name in part.components(index)}
            last = max(shards.values())
            written[last] += part.nbytes
            for name, first in shards.items():
                if first < last:
                    spilled[first] += index.nbytes([name])
                    until[first] = max(until[first], last)
        return cls([temporary(shard) for shard in index.shards], written, spilled, until)

    @classmethod
    def foreseen(cls, checkpoint: int, installed: int) -> ShardBytes:
        """Return the bytes for a checkpoint of this size, before its shards are known."""
        whole, last = divmod(checkpoint, _SHARD_BYTES_MAX)
        fetched = [_SHARD_BYTES_MAX] * whole + [last]
        written = [installed * size // checkpoint for size in fetched]
        return cls(fetched, written, [0] * len(fetched), [0] * len(fetched))

    def peak(self, *, ahead: bool) -> int:
        """Return the most bytes on disk at once.

        With `ahead` a shard is fetched while the one before is quantized.
        """
        peak = total = 0
        for number, written in enumerate(self.written):
            total += written
            fetched = sum(self.fetched[number : number + 1 + ahead])
            held = sum(self.spilled[n] for n in range(number + 1) if number <= self.until[n])
            peak = max(peak, total + fetched + held)
        return peak + SMALL_FILES_BYTES


def find_disk_needs(
    target: Path,
    shards: ShardBytes,
    caches: Sequence[tuple[Path, int]] = (),
    free_disk: int | None = None,
) -> tuple[tuple[Need, ...], bool]:
    """Return the need of each disk beyond finished work, and whether a shard fits ahead.

    `caches` get so many bytes. free_disk: the free bytes of another machine's disks.
    """
    here = machine.disk_usage(workspace(target)) if free_disk is None else 0

    def needs(ahead: bool) -> tuple[Need, ...]:
        needed = add_up_needs((target, max(0, shards.peak(ahead=ahead) - here)), *caches)
        return needed if free_disk is None else tuple(replace(n, free=free_disk) for n in needed)

    ahead = all(need.suffices for need in needs(True))
    return needs(ahead), ahead


def find_memory_need(index: CheckpointIndex, blueprint: Blueprint) -> Need:
    """Return the need of memory for quantizing the largest part."""
    most = max(_part_memory(part, index) for part in model_parts(blueprint))
    return Need(Path(), _PROCESS_BYTES + most, machine.free_memory())


def _part_memory(part: ModelPart, index: CheckpointIndex) -> int:
    """Return the bytes of a part while it is made, one matrix at a time."""
    sources = [index.memory(name) for name in part.matrices(index)]
    stacked = 0
    if part.linear is not None:
        dense = part.linear.rows * part.linear.columns * part.linear.dtype.itemsize
        rounded = part.linear.quant_type == "int8" and sources != [dense]  # encoded from bf16
        stacked = dense if rounded or not part.is_one_matrix(index) else 0
    if part.linear is None or part.linear.quant_type == "none":
        same_type = sum(sources) == part.nbytes  # then it is not copied
        return stacked + max(sources) + (0 if same_type else part.nbytes)
    return stacked + max(sources) + 2 * part.nbytes


def _quantizing_seconds(index: CheckpointIndex, blueprint: Blueprint) -> float:
    """Return the seconds in which this machine quantizes all experts."""
    expert = blueprint.expert
    weights = sum(matrix.rows * matrix.columns for matrix in (expert.gate_up, expert.down))
    rows, columns = _SAMPLE_SHAPE
    spec = replace(expert.down, rows=rows, columns=columns, bias=False)
    if index.experts_quant_type:
        spec = replace(spec, quant_type="none")  # 4-bit codes are copied, or nearly so
    sample = torch.randn(_SAMPLE_SHAPE, generator=torch.Generator().manual_seed(0)).to(
        torch.bfloat16
    )
    spec.encode(sample)  # the first time loads code
    start = time.perf_counter()
    spec.encode(sample)
    rate = sample.numel() / (time.perf_counter() - start)
    return weights * blueprint.expert_count / min(rate, _WEIGHTS_A_SECOND_MAX)
