"""Divides experts, and the work of a layer, among holders.

A holder is this machine, or a worker on another one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby, product

from mixchat.experts.cache import ExpertKey

_ROWS_LIKE_READING = 16  # rows that an expert computes in about the time of reading it


def share(
    counts: Mapping[ExpertKey, int], holders: Mapping[ExpertKey, Sequence[int]]
) -> dict[int, list[ExpertKey]]:
    """Return the experts that each holder computes, by its number.

    counts: the rows of each expert. holders: the numbers of its holders, at least one. The one with
    least to do gets it.
    """
    work: dict[int, float] = {}
    shares: dict[int, list[ExpertKey]] = {}
    # Experts of a single holder come first, then the largest. The small ones even out the work.
    for key in sorted(counts, key=lambda key: (len(holders[key]), -counts[key], key)):
        chosen = min(holders[key], key=lambda holder: work.get(holder, 0.0))
        work[chosen] = work.get(chosen, 0.0) + 1 + counts[key] / _ROWS_LIKE_READING
        shares.setdefault(chosen, []).append(key)
    return shares


def divide(
    layers: int,
    experts: int,
    slots: Sequence[int],
    uses: Mapping[ExpertKey, int] | None = None,
) -> list[list[ExpertKey]]:
    """Return the experts that each holder is to hold, the most used ones first.

    slots: how many each can hold, this machine first. uses: how often each expert was used before.
    Each holder gets the same share of every layer and of its uses, as far as its slots allow. Slots
    that are left hold copies of the most used. If there are too few slots, this machine gets more
    experts than it has slots.
    """
    uses = uses or {}
    every = (ExpertKey(*key) for key in product(range(layers), range(experts)))
    held = _assign(every, _quotas(layers * experts, slots), uses)
    # By expert, then by layer, so that without uses each layer gets as many copies.
    copies = [ExpertKey(layer, expert) for expert, layer in product(range(experts), range(layers))]
    copies.sort(key=lambda key: -uses.get(key, 0))
    for keys, count in zip(held, slots, strict=True):
        own = set(keys)
        room = max(count - len(keys), 0)
        keys += [key for key in copies if key not in own][:room]
        keys.sort(key=lambda key: (-uses.get(key, 0), key.expert, key.layer))
    return held


def in_proportion(total: int, weights: Sequence[int]) -> list[int]:
    """Return whole numbers that sum to `total`, in proportion to weights, of which one is not 0."""
    every = sum(weights)
    parts = [total * weight // every for weight in weights]
    owed = [total * weight % every for weight in weights]
    for number in sorted(range(len(parts)), key=lambda n: -owed[n])[: total - sum(parts)]:
        parts[number] += 1
    return parts


def _assign(
    keys: Iterable[ExpertKey], quotas: Sequence[int], uses: Mapping[ExpertKey, int]
) -> list[list[ExpertKey]]:
    held: list[list[ExpertKey]] = [[] for _ in quotas]
    for _, group in groupby(sorted(keys), key=lambda key: key.layer):
        keys_of_layer = sorted(group, key=lambda key: (-uses.get(key, 0), key))
        room = _layer_counts(quotas, [len(keys) for keys in held], len(keys_of_layer))
        work = [0] * len(quotas)
        # The most used expert goes to the holder with least to do, which evens out their work.
        for key in keys_of_layer:
            holder = min(
                (number for number, count in enumerate(room) if count),
                key=lambda number: (work[number], -room[number], number),
            )
            room[holder] -= 1
            work[holder] += uses.get(key, 0) + 1
            held[holder].append(key)
    return held


def _quotas(total: int, slots: Sequence[int]) -> list[int]:
    """Return how many different experts each holder gets, as equal as the slots allow."""
    if sum(slots) <= total:
        return [total - sum(slots[1:]), *slots[1:]]
    quotas = [0] * len(slots)
    for _ in range(total):
        free = [number for number, count in enumerate(slots) if quotas[number] < count]
        quotas[min(free, key=lambda number: quotas[number])] += 1
    return quotas


def _layer_counts(quotas: Sequence[int], held: Sequence[int], experts: int) -> list[int]:
    """Return how many of a layer's experts each holder gets. `held` counts its earlier ones.

    After each layer all holders have the same share of their quotas, up to rounding.
    """
    done = sum(held) + experts
    every = sum(quotas)
    due = [quota * done / every - count for quota, count in zip(quotas, held, strict=True)]
    counts = [max(int(missing), 0) for missing in due]
    # Rounding leaves some experts over, or too few. The holder that is owed most gets the next.
    while sum(counts) != experts:
        step = 1 if sum(counts) < experts else -1
        owed = [missing - count for missing, count in zip(due, counts, strict=True)]
        number = max(
            (n for n in range(len(counts)) if counts[n] + step >= 0), key=lambda n: step * owed[n]
        )
        counts[number] += step
    return counts
