"""The speed with workers: what is expected of a layer is the mean over all choices of a router."""

from collections.abc import Sequence, Set
from itertools import combinations, pairwise, product
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planning_tools import BLUEPRINT, CPU, GPU, GPU_SPEEDS, SPEEDS, without_disk

from mixchat.experts.cache import ExpertKey
from mixchat.experts.placement import Placement
from mixchat.planning.expectation import ModelSize, TokenCost, token_cost
from mixchat.planning.machine_speeds import MachineSpeeds, Measurement
from mixchat.planning.routing import layer_loads
from mixchat.planning.worker_split import WorkerOffer, WorkerSplit, spread_cost, spread_model

SIZE = ModelSize(layers=2, experts_per_token=2, expert=10**6, head=3 * 10**6)


def config(layers: int, experts: int, chosen: int) -> Any:
    return SimpleNamespace(
        num_moe_layers=layers, num_local_experts=experts, num_experts_per_tok=chosen
    )


def halves(layers: int = 1) -> list[set[ExpertKey]]:
    return [
        {ExpertKey(n, e) for n in range(layers) for e in part}
        for part in ((0, 1, 2, 3), (4, 5, 6, 7))
    ]


def offer(slots: int = 256, expert_seconds: float = 0.003, round_trip: float = 2e-4) -> WorkerOffer:
    return WorkerOffer("10.0.0.2:7917", slots, expert_seconds, round_trip)


def cost(held: Sequence[Set[ExpertKey]], *offers: WorkerOffer, **model: Any) -> TokenCost:
    loads = layer_loads(config(SIZE.layers, 8, 2), held)
    found = spread_cost(SIZE, SPEEDS, "cpu", loads, offers, 1, 1)
    assert found is not None
    return found


def spread(slots: int, *offers: WorkerOffer, speeds: MachineSpeeds = SPEEDS) -> WorkerSplit:
    known = Measurement(0.0, (speeds,))
    return spread_model(BLUEPRINT, CPU, known, Placement(slots, 0, 256), offers)


def rate(found: WorkerSplit) -> float:
    assert found.expected.tokens_per_second is not None
    return found.expected.tokens_per_second


def brute_force_waiting(
    held: Sequence[Set[ExpertKey]], seconds: Sequence[float], trips: Sequence[float]
) -> float:
    """The mean of what this machine waits in a layer for the others, over all pairs of experts.

    An expert that only one holds is computed there; then the other by who has less to do, the first
    one of equals.
    """
    waits = []
    for pair in combinations(range(8), 2):
        having = sorted(
            ([n for n, part in enumerate(held) if (0, e) in part] for e in pair), key=len
        )
        first = having[0][0]
        second = next((n for n in having[1] if n != first), first)
        ends = [0.0] * len(held)
        for holder in (first, second):
            ends[holder] += seconds[holder]
        others = [end + trip for end, trip in zip(ends[1:], trips, strict=True) if end]
        waits.append(max([0.0, *(end - ends[0] for end in others)]))
    return sum(waits) / len(waits)


parts = st.lists(st.sets(st.integers(0, 7)), min_size=1, max_size=3)
times = st.floats(1e-4, 1e-2)


@given(parts, st.lists(times, min_size=3, max_size=3), st.lists(times, min_size=3, max_size=3))
def test_waiting_is_that_of_going_through_all_pairs(there, seconds, trips):
    """Whatever the others hold, copies of this machine's among them."""
    here = {0, 1, 2, 3} | set(range(8)) - set().union(*there)
    held = [{ExpertKey(layer, e) for layer in range(2) for e in part} for part in (here, *there)]
    offers = [offer(8, *pair) for pair in zip(seconds, trips, strict=True)][: len(there)]
    one = SPEEDS.expert_time("cpu", 1)
    waiting = brute_force_waiting(held, [one, *seconds], trips[: len(there)])
    assert cost(held, *offers).waiting == pytest.approx(2 * waiting)


def test_without_workers_it_is_the_cost_of_a_machine_alone():
    everything = {ExpertKey(layer, e) for layer in range(2) for e in range(8)}
    loads = layer_loads(config(2, 8, 2), [everything])
    for hit_rate, host_hit_rate in product((0, 0.4, 1), repeat=2):
        assert spread_cost(SIZE, SPEEDS, "cpu", loads, (), hit_rate, host_hit_rate) == token_cost(
            SIZE, SPEEDS, "cpu", hit_rate, host_hit_rate
        )


def test_a_slow_link_costs_a_round_trip_in_each_layer_that_uses_it():
    fast, slow = (cost(halves(2), offer(8, round_trip=trip)) for trip in (0.01, 0.06))
    assert slow.waiting - fast.waiting == pytest.approx(2 * 0.05 * 22 / 28)
    assert slow.computing == fast.computing


def test_two_machines_with_half_of_the_experts_each_hold_all_and_read_nothing():
    found = spread(128, offer(128))
    assert (found.held, found.here, found.copies) == ((128,), 128, 0)
    assert (found.on_workers, found.expected.held) == (128, 256)
    assert found.expected.cost.read == 0
    assert (found.expected.hit_rate, found.expected.host_hit_rate) == (1, 1)
    assert rate(found) > 5 * rate(spread(128, offer(2)))


def test_memory_that_is_left_holds_copies_which_makes_it_faster():
    found = spread(200, offer(156))
    assert (found.here, found.held, found.on_workers, found.copies) == (200, (156,), 156, 100)
    assert found.expected.held == 256
    rates = [rate(spread(slots, offer(slots))) for slots in (128, 160, 192, 256)]
    assert all(fewer < more for fewer, more in pairwise(rates))


def test_what_nobody_holds_is_read_by_this_machine():
    found = spread(64, offer(64), offer(32))
    assert (found.here, found.held, found.on_workers, found.copies) == (64, (64, 32), 96, 0)
    assert found.expected.held == 160
    used_here = 64 * 160 / 256  # uses of this machine's experts, of which it holds 64 of 160
    assert 0.3 * used_here < found.expected.cost.read < 0.7 * used_here
    assert found.expected.hit_rate == pytest.approx(1 - found.expected.cost.read / 64)


def test_behind_a_gpu_ram_holds_what_neither_it_nor_a_worker_has():
    known = Measurement(0.0, (GPU_SPEEDS,))
    found = spread_model(BLUEPRINT, GPU, known, Placement(60, 256, 256), [offer(100)])
    assert (found.here, found.held, found.copies, found.expected.held) == (156, (100,), 0, 256)
    assert found.expected.cost.read == 0
    assert 0 < found.expected.cost.copied < 64 * 156 / 256
    assert found.expected.host_hit_rate == 1 > found.expected.hit_rate


def test_a_slow_worker_makes_it_slower_than_none_where_all_fits_here():
    alone, helped = (spread(256, offer(256, seconds)) for seconds in (0.003, 0.1))
    assert rate(helped) < rate(alone)


def test_without_figures_of_the_disk_only_what_needs_no_disk_is_known():
    blind = without_disk(SPEEDS)
    assert spread(64, offer(64), speeds=blind).expected.speed is None
    assert spread(128, offer(128), speeds=blind).expected.speed is not None
