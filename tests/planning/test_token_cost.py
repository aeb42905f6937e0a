"""The cost of a token: computing, copying, reading, and the part that runs at the same time."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planning_tools import BLUEPRINT, GPU_SPEEDS, without_disk

from mixchat.planning.expectation import (
    MISSING_EXPERTS_S,
    OVERLAP,
    ModelSize,
    TokenCost,
    gpu_token_cost,
    token_cost,
)
from mixchat.planning.gpu_cost import GPUWork
from mixchat.planning.gpu_speeds import KERNEL_S, SYNC_S
from mixchat.planning.machine_speeds import MachineSpeeds

# 8 uses of experts a token. A head as large as three experts.
SIZE = ModelSize(layers=4, experts_per_token=2, expert=1_000_000, head=3_000_000)
CPU = MachineSpeeds(1e9, 2e9, 2e9, 3e10, {1: 0.01, 8: 0.02}, 0.002)
rates = st.floats(0, 1)


def cost(speeds: MachineSpeeds, hit_rate: float) -> TokenCost:
    found = token_cost(SIZE, speeds, hit_rate)
    assert found is not None
    return found


def gpu_cost(hit_rate: float, host_hit_rate: float) -> TokenCost:
    found = gpu_token_cost(BLUEPRINT, GPU_SPEEDS, (100,), hit_rate, host_hit_rate)
    assert found is not None
    return found


def test_on_a_cpu_that_holds_all_a_token_is_only_computed():
    found = cost(CPU, 1)
    # 4 layers, 8 experts, and the head at the pace of an expert.
    assert found.computing == pytest.approx(4 * 0.002 + 8 * 0.01 + 3 * 0.01)
    assert (found.copying, found.reading, found.copied, found.read) == (0, 0, 0, 0)
    assert found.seconds == found.computing


def test_a_layer_on_a_cpu_takes_longer_if_any_expert_may_be_missing():
    """Python asks for each expert then. Plans for most experts in memory were half too high."""
    missing = cost(CPU, 0.99).computing - cost(CPU, 1).computing
    assert missing == pytest.approx(4 * MISSING_EXPERTS_S)


def test_experts_of_the_first_layers_are_not_read_while_others_are_computed():
    """Half of what could be read counted as hidden, whatever the count of layers. Plans for 48
    layers of Qwen3 were a fifth too slow, and for 12 layers a fifth too fast."""
    few, many = (token_cost(replace(SIZE, layers=layers, head=0), CPU, 0.5) for layers in (6, 48))
    assert few is not None
    assert many is not None
    assert few.hidden == 0
    assert many.hidden == pytest.approx((1 - 6 / 48) * min(many.computing / 2, many.reading))
    with_head = token_cost(replace(SIZE, layers=48), CPU, 0.5)
    assert with_head is not None
    assert with_head.hidden == pytest.approx(many.hidden * many.computing / with_head.computing)


def test_first_layers_without_experts_count_at_the_pace_of_an_expert():
    """They cost no time at all once."""
    more = token_cost(replace(SIZE, first_layers=5_000_000), CPU, 1)
    assert more is not None
    assert more.computing == pytest.approx(cost(CPU, 1).computing + 5 * 0.01)


def test_what_a_cpu_does_not_hold_is_read_more_slowly_while_it_computes():
    found = cost(CPU, 0.75)
    assert found.read == pytest.approx(2)
    assert found.reading == pytest.approx(2 * 1e6 / 2e9)  # with nothing beside it
    assert found.slowed == pytest.approx(0.5)
    assert (found.copied, found.copying) == (0, 0)


def test_a_gpu_reads_what_it_holds_while_the_cpu_computes_the_rest():
    """Missing experts were copied to the GPU, which takes 8 times as long as to compute them."""
    found, gpu = gpu_cost(0.25, 0.75), GPU_SPEEDS.gpus[0]
    expert = BLUEPRINT.expert.nbytes / (0.8 * gpu.memory)
    assert (found.missed, found.read) == (pytest.approx(48), pytest.approx(16))
    longest = 0.25**2 * 2 * expert + 2 * 0.25 * 0.75 * 0.003 + 0.75**2 * 2 * 0.003
    assert found.waiting == pytest.approx(32 * longest - 16 * expert)
    assert found.reading == pytest.approx(16 * BLUEPRINT.expert.stride / 3e9)
    assert (found.copied, found.copying) == (0, 0)
    everything = gpu_cost(1, 1)
    assert (everything.waiting, everything.missed, everything.read) == (0, 0, 0)
    waits = 32 * (SYNC_S + KERNEL_S)
    assert found.computing == pytest.approx(everything.computing - 48 * expert + waits)


def test_with_all_in_vram_a_token_takes_its_bytes_its_kernels_and_one_wait():
    """Every type had 300 GB/s, so that a plan for any card and any bits was the same."""
    gpu, work = GPU_SPEEDS.gpus[0], GPUWork(BLUEPRINT, GPU_SPEEDS.gpus, (1,))
    kernels = 32 * 9 * KERNEL_S
    seconds = gpu_cost(1, 1).seconds
    assert seconds == pytest.approx(
        work.bytes_per_token / (0.8 * gpu.memory) + kernels + SYNC_S, rel=1e-3
    )
    faster = replace(gpu, memory=2 * gpu.memory)
    assert gpu_token_cost(
        BLUEPRINT, replace(GPU_SPEEDS, gpus=(faster,)), (1,), 1, 1
    ).seconds == pytest.approx((seconds - kernels - SYNC_S) / 2 + kernels + SYNC_S)
    measured = replace(gpu, efficiency={"nf4": 0.4})
    slower = gpu_token_cost(BLUEPRINT, replace(GPU_SPEEDS, gpus=(measured,)), (1,), 1, 1)
    assert slower.seconds > seconds


def test_answers_on_a_gpu_take_turns_and_share_what_is_read_from_the_disk():
    """They were planned as one pass, for which there is no graph."""
    one, two = (
        gpu_token_cost(BLUEPRINT, GPU_SPEEDS, (100,), 0.4, 0.7, answers=answers)
        for answers in (1, 2)
    )
    assert one is not None
    assert two is not None
    assert two.computing == pytest.approx(2 * one.computing)
    assert (two.waiting, two.missed) == (2 * one.waiting, 2 * one.missed)
    assert one.read < two.read < 2 * one.read


def test_a_part_of_the_shorter_of_both_is_hidden_behind_the_other():
    slow = TokenCost(computing=0.1, copying=0.3, reading=0.5, copied=1, read=1)
    assert slow.hidden == pytest.approx(OVERLAP * 0.1)
    assert slow.seconds == pytest.approx(0.9 - OVERLAP * 0.1)
    fast = TokenCost(computing=1.0, copying=0.1, reading=0.1, copied=1, read=1)
    assert fast.seconds == pytest.approx(1.2 - OVERLAP * 0.2)
    slowed = replace(slow, slowed=0.6)
    assert slowed.hidden == pytest.approx(OVERLAP * 0.06)


def test_without_figures_of_the_disk_only_what_needs_none_has_a_cost():
    blind = without_disk(CPU)
    assert cost(blind, 1) == cost(CPU, 1)
    assert token_cost(SIZE, blind, hit_rate=0.5) is None


@given(rates, rates, rates)
def test_more_hits_never_cost_more(one, other, slots):
    worse, better = sorted((one, other))
    assert cost(CPU, better).seconds <= cost(CPU, worse).seconds
    assert gpu_cost(slots, better).seconds <= gpu_cost(slots, worse).seconds
    assert gpu_cost(better, 1).seconds <= gpu_cost(worse, 1).seconds + 1e-12
