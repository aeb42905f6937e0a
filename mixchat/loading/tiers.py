"""Builds the holder of the experts out of slots, RAM and the disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from mixchat.base import gpu, machine
from mixchat.base.errors import ResourceError
from mixchat.base.progress import Note
from mixchat.base.safetensors import TensorSpec
from mixchat.experts.cache import POLICIES, ExpertCache, ExpertKey, ExpertStats, Passes
from mixchat.experts.compute import DeviceCompute, HostCompute
from mixchat.experts.dispatcher import Dispatcher
from mixchat.experts.fetcher import Fetcher
from mixchat.experts.memory import CPU, MemoryWatch
from mixchat.experts.placement import MIN_SLOTS, Placement, SlotSizes
from mixchat.experts.prefetch import NextRouters, Prefetch
from mixchat.experts.sharing import assign_owners
from mixchat.experts.sources import DiskSource, HostSource
from mixchat.experts.store import ExpertStore
from mixchat.loading.workers import Share
from mixchat.planning.fitting import slot_sizes
from mixchat.planning.measuring import measure_machine, saved_measurement
from mixchat.weights.format.installed_model import InstalledModel


def build_experts(
    installed: InstalledModel,
    share: Share,
    devices: Sequence[torch.device],
    policy: str,
    note: Note,
    *,
    exact: bool = False,
    predicts: bool = True,
) -> Dispatcher:
    """Return the holder of an installed model's experts, which computes them on `devices`.

    On "cpu" the slots are in RAM. With GPUs, RAM is another tier, and each GPU owns some of the
    experts. With `exact` an expert is always computed by the same device. Raises `ResourceError` if
    a device cannot hold two experts.
    """
    placement = share.placement
    for device, slots in zip(devices, placement.by_device, strict=True):
        if not slots:
            note(f"{device} is not used: it has too little memory free for two experts")
    used = [device for device, slots in zip(devices, placement.by_device, strict=True) if slots]
    placement = replace(placement, other_slots=tuple(filter(None, placement.other_slots)))
    config, stats = installed.config, ExpertStats()
    every = {
        ExpertKey(layer, expert)
        for layer in range(config.num_moe_layers)
        for expert in range(config.num_local_experts)
    }
    here = every if share.here is None else share.here
    # If workers are lost, the GPUs compute their experts, too.
    room = placement.by_device
    owner = assign_owners(here, room) | assign_owners(every - here, room)
    counts = Counter(owner.values())
    placements = placement.parts([counts[number] for number in range(len(used))])
    # If the page cache can hold all experts, the next start reads none from the disk.
    held = placement.slots if used[0] == CPU else placement.host_slots
    cacheable = machine.free_memory() - held * installed.blueprint.mean_expert
    stays_cached = cacheable >= installed.blueprint.experts_size
    holders = [
        _on_device(
            installed,
            own_placement,
            device,
            policy,
            stats,
            note,
            exact=exact,
            stays_cached=stays_cached,
            is_first=number == 0,
            in_sizes=share.here is None and len(devices) == 1,
        )
        for number, (device, own_placement) in enumerate(zip(used, placements, strict=True))
    ]
    return Dispatcher(
        holders,
        stats,
        owner=owner.__getitem__,
        prefetch=_prefetch(installed, stats, used[0]) if predicts else None,
        workers=share.workers,
        copies=share.copies,
    )


def _on_device(
    installed: InstalledModel,
    placement: Placement,
    device: torch.device,
    policy: str,
    stats: ExpertStats,
    note: Note,
    *,
    exact: bool,
    stays_cached: bool,
    is_first: bool,
    in_sizes: bool,
) -> DeviceCompute:
    """Return the holder of a device's experts. Only its mover reads its files and RAM.

    in_sizes: give slots the sizes of the layers' experts, if the device may hold any of them.
    """
    passes = Passes(installed.config.num_moe_layers)
    blueprint = installed.blueprint
    used, size = blueprint.computed_on(device), blueprint.expert.stride
    reads_once = max(placement.slots, placement.host_slots) >= placement.experts
    # Through the page cache, a model that just fit was read at a third of the disk's speed.
    disk = DiskSource(installed, stats, choose=not (reads_once and stays_cached))
    in_ram = None
    if placement.host_slots:
        # Experts that come down from a device are only of use in the file's layout.
        same = blueprint.all_in_layout_of(used.expert)
        swaps = placement.host_slots < placement.experts and same
        order, stored = POLICIES[policy](passes), blueprint.expert_of
        is_locked = gpu.is_gpu(device)
        in_ram = HostSource(
            disk,
            placement.host_slots,
            stored,
            order,
            size=size,
            swaps=swaps,
            lock=lambda block: gpu.page_lock(block, device) if is_locked else None,
        )
    # Slots of the largest size made a mix hold as few experts as the larger type alone.
    sizes = SlotSizes((size,))
    if in_sizes:
        sizes = slot_sizes(blueprint).for_slots(placement.slots, placement.experts)
    name = "device" if is_first else "other-device"
    store = ExpertStore(
        in_ram or disk,
        stored=blueprint.expert_of,
        used=used.expert_of,
        size=sizes.of,
        device=device,
        stats=stats,
        name=name,
    )
    cache = ExpertCache(placement.slots, POLICIES[policy](passes), sizes.of)
    watch = _watch(installed, placement) if device == CPU else None
    if device != CPU:
        cache.resize(_reserve(store, placement.slots, device, note))
    fetcher = Fetcher(cache, store, placement, passes, stats, watch)
    host = None if in_ram is None or exact else _host_compute(installed, in_ram, device, note)
    layers = range(installed.config.num_moe_layers)
    return DeviceCompute(fetcher, device, host, [id(used.expert_of(layer)) for layer in layers])


def _watch(installed: InstalledModel, placement: Placement) -> MemoryWatch:
    sizes = [expert.stride for expert in installed.blueprint.expert_forms]
    return MemoryWatch(
        machine.free_memory,
        reserve=placement.reserve,
        # If all fit, a limit by the largest would evict some while small ones are on their way.
        expert=min(sizes) if placement.slots >= placement.experts else max(sizes),
        slots=placement.slots,
        least=MIN_SLOTS,
    )


def _reserve(store: ExpertStore, slots: int, device: torch.device, note: Note) -> int:
    """Reserve `slots` slots, or half of them until they fit. Return their count."""
    while True:
        try:
            store.reserve(slots)
            return slots
        except torch.OutOfMemoryError:
            for slot in range(slots):
                store.release(slot)
            slots //= 2
            if slots < MIN_SLOTS:
                raise ResourceError(
                    f"{device} has less memory than it says: not even two experts fit",
                    hint="--device chooses others, or the RAM (cpu).",
                ) from None
            note(f"{device} has less memory than it says: it holds {slots} experts")


def _host_compute(
    installed: InstalledModel, source: HostSource, device: torch.device, note: Note
) -> HostCompute | None:
    blueprint, directory = installed.blueprint, installed.directory
    if not blueprint.all_in_layout_of(blueprint.computed_on(CPU).expert):
        return None  # the CPU computes this layout slowly, or not at all
    known = saved_measurement(blueprint, directory, device)
    if known is None:
        note("measuring this machine, 20 s at most (only the first time)")
        known = measure_machine(blueprint, directory, device)
    measured = known.typical
    if measured.copy_bandwidth is None:
        return None
    return HostCompute(
        source,
        copy_seconds=blueprint.mean_expert / measured.copy_bandwidth,
        host_seconds=lambda rows: measured.expert_time("cpu", rows),
    )


def _prefetch(installed: InstalledModel, stats: ExpertStats, device: torch.device) -> Prefetch:
    config, blueprint = installed.config, installed.blueprint
    layers = range(config.first_k_dense_replace, config.num_hidden_layers)

    def tensors(spec: Callable[[int], TensorSpec]) -> list[torch.Tensor]:
        return [installed.tensor(spec(layer)).to(device) for layer in layers]

    routers = NextRouters(
        tensors(blueprint.gate),
        tensors(lambda layer: blueprint.norms(layer)[1]),
        config.num_experts_per_tok,
        tensors(blueprint.gate_bias) if config.moe_bias else (),
        tensors(blueprint.score_correction) if config.e_score_correction_bias else (),
        config.scoring_func,
    )
    return Prefetch(routers, stats)
