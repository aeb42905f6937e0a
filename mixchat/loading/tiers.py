"""Builds the tiers of experts, and what computes them: slots, RAM behind a GPU's, the disk."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mixchat import machine
from mixchat.errors import ResourceError
from mixchat.experts.cache import ExpertCache
from mixchat.experts.fetcher import Fetcher
from mixchat.experts.host_compute import HostCompute
from mixchat.experts.memory import CPU, MemoryWatch, page_lock
from mixchat.experts.placement import MIN_SLOTS, Placement
from mixchat.experts.policies import POLICIES, Passes
from mixchat.experts.prefetch import NextRouters, Prefetch
from mixchat.experts.runner import CachedExpertRunner, compute
from mixchat.experts.sources import DiskSource, HostTier
from mixchat.experts.store import ExpertStore
from mixchat.planning.speeds import known_speeds, measure_speeds
from mixchat.weights.format.installed_model import InstalledModel

Note = Callable[[str], object]


def build_experts(
    kept: InstalledModel,
    placement: Placement,
    device: torch.device,
    policy: str,
    note: Note,
    *,
    exact: bool = False,
) -> tuple[CachedExpertRunner, Fetcher]:
    """What runs the experts of a kept model on `device`, and what fetches them for it.

    `device` is torch's "cpu", where the slots are in RAM and fill from disk, or another one, behind
    which RAM is a tier of its own. `note` gets what a person should hear of. With `exact` the same
    device computes all experts, and in the same way however many tokens there are. Raises
    `ResourceError` where the device cannot hold two experts after all.
    """
    passes = Passes(kept.config.num_hidden_layers)
    stored, used = kept.blueprint.expert, kept.blueprint.computed_on(device, exact=exact).expert
    disk = DiskSource(kept, choose=max(placement.slots, placement.host_slots) < placement.experts)
    tier = None
    if placement.host_slots:
        # What comes down from a device can only be used where it lies as in the file.
        swaps = placement.host_slots < placement.experts and stored == used
        lock = page_lock if device.type == "cuda" else _no_lock
        order = POLICIES[policy](passes)
        tier = HostTier(disk, placement.host_slots, stored, order, swaps=swaps, lock=lock)
    store = ExpertStore(tier or disk, stored=stored, used=used, device=device)
    slots, watch = placement.slots, None
    if device == CPU:
        watch = _watch(kept, placement)
    else:
        slots = _reserve(store, slots, note)
    cache = ExpertCache(slots, POLICIES[policy](passes))
    fetcher = Fetcher(cache, store, placement, passes, watch)
    host = None if tier is None or exact else _host_compute(kept, tier, device, note)
    return CachedExpertRunner(fetcher, _prefetch(kept, fetcher, device), host), fetcher


def _watch(kept: InstalledModel, placement: Placement) -> MemoryWatch:
    return MemoryWatch(
        machine.free_memory,
        reserve=placement.reserve,
        expert=kept.blueprint.expert.stride,
        slots=placement.slots,
        least=MIN_SLOTS,
    )


def _reserve(store: ExpertStore, slots: int, note: Note) -> int:
    """Take the memory of as many slots as the device gives, down from `slots` by halves."""
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
                    "the device has less memory than it says: not even two experts fit",
                    hint="--device cpu takes the RAM instead.",
                ) from None
            note(f"the device has less memory than it says: it holds {slots} experts")


def _host_compute(
    kept: InstalledModel, tier: HostTier, device: torch.device, note: Note
) -> HostCompute | None:
    blueprint, directory = kept.blueprint, kept.directory
    if blueprint.expert != blueprint.computed_on(CPU).expert:
        return None  # the CPU computes them as they lie slowly, or not at all
    known = known_speeds(blueprint, directory, device)
    if known is None:
        note("measuring this machine, about 10 s (only the first time)")
        known = measure_speeds(blueprint, directory, device)
    measured = known.typical
    if measured.copy_bandwidth is None:
        return None
    return HostCompute(
        tier,
        compute,
        copy_seconds=blueprint.expert.stride / measured.copy_bandwidth,
        host_seconds=lambda rows: measured.expert_time("cpu", rows),
    )


def _prefetch(kept: InstalledModel, fetcher: Fetcher, device: torch.device) -> Prefetch:
    config, blueprint = kept.config, kept.blueprint
    layers = range(config.num_hidden_layers)
    gates = [kept.tensor(blueprint.gate(layer)).to(device) for layer in layers]
    norms = [kept.tensor(blueprint.norms(layer)[1]).to(device) for layer in layers]
    return Prefetch(NextRouters(gates, norms, config.num_experts_per_tok), fetcher.stats)


def _no_lock(block: torch.Tensor) -> None:
    """Memory that no GPU copies from needs no locking."""
