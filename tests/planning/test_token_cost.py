"""The cost of a token: computing, copying, reading, and the part that runs at the same time."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planning_tools import without_disk

from mixchat.planning.expectation import OVERLAP, ModelSize, TokenCost, token_cost
from mixchat.planning.machine_speeds import MachineSpeeds

# 8 uses of experts a token. A head as large as three experts.
SIZE = ModelSize(layers=4, experts_per_token=2, expert=1_000_000, head=3_000_000)
CPU = MachineSpeeds(1e9, 2e9, 2e9, 3e10, None, {"cpu": {1: 0.01, 8: 0.02}}, 0.002)
GPU = dataclasses.replace(
    CPU, copy_bandwidth=1e10, expert_seconds={"cpu": {1: 0.01, 8: 0.02}, "cuda": {1: 1e-3, 8: 2e-3}}
)
rates = st.floats(0, 1)


def cost(speeds: MachineSpeeds, device: str, hit_rate: float, host_hit_rate: float) -> TokenCost:
    found = token_cost(SIZE, speeds, device, hit_rate, host_hit_rate)
    assert found is not None
    return found


def test_on_a_cpu_that_holds_all_a_token_is_only_computed():
    found = cost(CPU, "cpu", 1, 1)
    # 4 layers, 8 experts, and the head at the pace of an expert.
    assert found.computing == pytest.approx(4 * 0.002 + 8 * 0.01 + 3 * 0.01)
    assert (found.copying, found.reading, found.copied, found.read) == (0, 0, 0, 0)
    assert found.seconds == found.computing


def test_first_layers_without_experts_count_at_the_pace_of_an_expert():
    """They cost no time at all once."""
    more = token_cost(dataclasses.replace(SIZE, first_layers=5_000_000), CPU, "cpu", 1, 1)
    assert more is not None
    assert more.computing == pytest.approx(cost(CPU, "cpu", 1, 1).computing + 5 * 0.01)


def test_what_a_cpu_does_not_hold_is_read_more_slowly_while_it_computes():
    found = cost(CPU, "cpu", 0.75, 0.75)
    assert found.read == pytest.approx(2)
    assert found.reading == pytest.approx(2 * 1e6 / 2e9)  # with nothing beside it
    assert found.slowed == pytest.approx(0.5)
    assert (found.copied, found.copying) == (0, 0)


def test_what_a_gpu_does_not_hold_is_copied_and_read_only_where_ram_does_not_hold_it():
    found = cost(GPU, "cuda", 0.25, 0.75)
    assert found.computing == pytest.approx(4 * 0.002 + 11 * 1e-3)  # by the GPU
    assert (found.copied, found.read) == (pytest.approx(6), pytest.approx(2))
    assert found.copying == pytest.approx(6 * 1e6 / 1e10)
    assert found.reading == pytest.approx(2 * 1e6 / 2e9)


def test_a_part_of_the_shorter_of_both_is_hidden_behind_the_other():
    slow = TokenCost(computing=0.1, copying=0.3, reading=0.5, copied=1, read=1)
    assert slow.hidden == pytest.approx(OVERLAP * 0.1)
    assert slow.seconds == pytest.approx(0.9 - OVERLAP * 0.1)
    fast = TokenCost(computing=1.0, copying=0.1, reading=0.1, copied=1, read=1)
    assert fast.seconds == pytest.approx(1.2 - OVERLAP * 0.2)
    slowed = dataclasses.replace(slow, slowed=0.6)
    assert slowed.hidden == pytest.approx(OVERLAP * 0.06)


def test_without_figures_of_the_disk_only_what_needs_none_has_a_cost():
    blind = without_disk(CPU)
    assert cost(blind, "cpu", 1, 1) == cost(CPU, "cpu", 1, 1)
    assert token_cost(SIZE, blind, "cpu", hit_rate=0.5, host_hit_rate=0.5) is None


@given(rates, rates, rates, st.sampled_from([CPU, GPU]))
def test_more_hits_never_cost_more(one, other, slots, known):
    worse, better = sorted((one, other))
    device = "cuda" if known is GPU else "cpu"
    assert cost(known, device, slots, better).seconds <= cost(known, device, slots, worse).seconds
    assert cost(known, device, better, 1).seconds <= cost(known, device, worse, 1).seconds
