"""Builds the holder of the experts out of slots, RAM and the disk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise, product

import torch

from mixchat.base import gpu, machine
from mixchat.base.errors import ResourceError
from mixchat.base.model_config import ModelConfig
from mixchat.base.progress import Note
from mixchat.base.settings import report_path_by_key
from mixchat.engine.report import saved_uses
from mixchat.experts.cache import ExpertCache, ExpertKey, ExpertStats, LayeredLRU, Passes
from mixchat.experts.compute import HostCompute
from mixchat.experts.dispatcher import Dispatcher
from mixchat.experts.gpu_experts import GpuExperts
from mixchat.experts.load_queue import LoadQueue
from mixchat.experts.memory import CPU, MemoryWatch
from mixchat.experts.placement import MIN_SLOTS, Placement, SlotSizes, reserve_of
from mixchat.experts.prefetch import LAYERS_AHEAD, NextRouters
from mixchat.experts.store import READS, ExpertStore
from mixchat.experts.tier import Tier
from mixchat.experts.vram import VramTier
from mixchat.loading.workers import ExpertShare
from mixchat.planning.fitting import slot_sizes
from mixchat.planning.measuring import estimated_speeds, saved_speeds
from mixchat.weights.format.installed_model import InstalledModel

# Bytes a second. If the disk is slower than the first, the page cache keeps a model. If it is
# slower than the second, a token's experts are not predicted. With 500 MB/s right predictions
# gained nothing, and with a third of wrong ones Qwen3 had 3.5 tok/s instead of 4.2 to 5.7.
_SLOW_DISK = 1e9
_SLOWEST_TO_PREDICT = 6e8


def build_experts(
    installed: InstalledModel,
    share: ExpertShare,
    devices: Sequence[torch.device],
    note: Note,
    *,
    predicts: bool = True,
) -> Dispatcher | GpuExperts:
    """Return the holder of an installed model's experts, which computes them on `devices`.

    With GPUs, RAM is another tier. Raises `ResourceError` if a GPU cannot hold two experts.
    """
    placement = share.placement
    if not placement.layers:
        return _in_ram(installed, share, placement, predicts=predicts)
    host = _in_ram(installed, share, placement.in_ram(), predicts=predicts)
    own_layers = moe_layers(installed.config, placement)
    uses = saved_uses(report_path_by_key(installed.directory.name))
    gpus = []
    for device, count, layers, slots in zip(
        devices, placement.layers, own_layers, placement.by_device, strict=True
    ):
        if not count:
            note(f"{device} is not used: it has too little memory free")
        elif layers:
            vram = _in_vram(installed, host, device, layers, slots, note)
            vram.policy.expect(uses)
            if share.here is not None:
                each = range(installed.config.num_local_experts)
                every = (ExpertKey(*key) for key in product(layers, each))
                vram.policy.exclude(key for key in every if key not in share.here)
            gpus.append(vram)
    blueprint = installed.blueprint
    first = gpus[0].device
    speeds = saved_speeds(blueprint, installed.directory, first)
    known = speeds or estimated_speeds(blueprint, [first])
    return GpuExperts(
        host,
        gpus,
        copy_seconds=lambda layer: blueprint.expert_of(layer).stride / known.gpus[0].bus,
        host_seconds=lambda layer, rows: known.expert_time(rows),
    )


def moe_layers(config: ModelConfig, placement: Placement) -> list[range]:
    """Return the layers with experts of each GPU, counted without dense layers."""
    ends = [*accumulate(placement.layers, initial=0)]
    first = config.first_k_dense_replace
    return [range(max(start - first, 0), max(end - first, 0)) for start, end in pairwise(ends)]


def _in_ram(
    installed: InstalledModel, share: ExpertShare, placement: Placement, *, predicts: bool
) -> Dispatcher:
    """Return the holder of experts in RAM, which the CPU computes."""
    stats = ExpertStats()
    passes = Passes(installed.config.num_moe_layers)
    blueprint = installed.blueprint
    disk_rate = _disk_rate(installed)
    direct = not _stays_cached(installed, placement, disk_rate) and installed.open_direct()

    def read(key: ExpertKey, block: torch.Tensor, start: int) -> None:
        installed.read_expert(*key, block, start, direct=direct)

    # If all slots had the largest size, a mix would hold as few experts as the larger type alone.
    sizes = SlotSizes((blueprint.expert.stride,))
    if share.here is None:
        sizes = slot_sizes(blueprint).for_slots(placement.slots, placement.experts)
    store = ExpertStore(read, blueprint.expert_of, sizes.of, stats)
    slots = [*map(sizes.of, range(placement.slots))]
    cache = ExpertCache(slots, LayeredLRU(passes), sizes.of)
    watch = _watch(installed, placement)
    queue = LoadQueue(READS, may_fill=watch.is_ample, count_moved=stats.count_read)
    ram = Tier(cache, store, queue, passes, stats, experts=placement.experts, watch=watch)
    forms = [id(blueprint.expert_of(layer)) for layer in range(installed.config.num_moe_layers)]
    return Dispatcher(
        HostCompute(ram, installed.config.num_local_experts, forms),
        stats,
        next_routers=_next_routers(installed) if predicts else None,
        layers_ahead=LAYERS_AHEAD if disk_rate >= _SLOWEST_TO_PREDICT else 0,
        workers=share.workers,
        copies=share.copies,
    )


def _stays_cached(installed: InstalledModel, placement: Placement, disk_rate: float) -> bool:
    """Return whether the page cache is to keep a model for the next start.

    A read past the page cache takes no core and no memory. Two cores copied 5 GB out of the page
    cache in the time in which an NVMe read them. From a slow disk, the next start would be slow,
    too.
    """
    blueprint = installed.blueprint
    cacheable = machine.free_memory() - placement.slots * blueprint.mean_expert
    if placement.slots < placement.experts or cacheable < blueprint.experts_size:
        return False
    return disk_rate < _SLOW_DISK


def _disk_rate(installed: InstalledModel) -> float:
    """Return the measured bytes a second of the disk, infinite if it was not measured."""
    measured = saved_speeds(installed.blueprint, installed.directory, CPU)
    return (measured and measured.disk_idle) or math.inf


def _in_vram(
    installed: InstalledModel,
    host: Dispatcher,
    device: torch.device,
    layers: range,
    slots: int,
    note: Note,
) -> VramTier:
    """Return the slots in the memory of a GPU, or half as many if it has less than it says."""
    blueprint = installed.blueprint
    strides = [blueprint.expert_of(layer).stride for layer in layers]
    experts = installed.config.num_local_experts
    while True:
        slots = min(slots, len(layers) * experts)
        try:
            return VramTier(
                device,
                layers,
                experts,
                blueprint.expert_of,
                # The slots take the sizes of the layers by turns, so that in a mix each size gets
                # its part.
                [strides[slot % len(strides)] for slot in range(slots)],
                lambda key, block, start: installed.read_expert(*key, block, start),
                host.ram,
                reserve_of(gpu.total_memory(device)),
            )
        except torch.OutOfMemoryError:
            if not slots:
                raise ResourceError(
                    f"{device} has less memory than it says: not even two experts fit",
                    hint="--device chooses others, or the RAM (cpu).",
                ) from None
            slots //= 2
            gpu.release_unused(device)
            note(f"{device} has less memory than it says: it holds {slots} experts")


def _watch(installed: InstalledModel, placement: Placement) -> MemoryWatch:
    sizes = [expert.stride for expert in installed.blueprint.expert_forms]
    return MemoryWatch(
        machine.free_memory,
        reserve=placement.reserve,
        # If all experts fit, a limit by the largest one would evict experts while small ones are
        # loading.
        expert=min(sizes) if placement.slots >= placement.experts else max(sizes),
        slots=placement.slots,
        least=MIN_SLOTS,
    )


def _next_routers(installed: InstalledModel) -> NextRouters:
    config = installed.config
    blueprint = installed.blueprint
    layers = range(config.first_k_dense_replace, config.num_hidden_layers)
    routers = [blueprint.router(layer) for layer in layers]
    gates, biases, corrections = (
        [installed.tensor(specs[role]) for specs in routers if role in specs]
        for role in ("gate", "bias", "correction")
    )
    norms = [installed.tensor(blueprint.norms(layer)[1]) for layer in layers]
    choices = config.num_experts_per_tok
    return NextRouters(gates, norms, choices, biases, corrections, config.scoring_func)
