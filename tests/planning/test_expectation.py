"""The estimated speed: hit rates, and the cost of tokens and prompts."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planning_tools import BLIND, BLUEPRINT, CONFIG, CPU, GPU, GPU_SPEEDS, SPEEDS, estimate

from mixchat.engine.chunk_sizer import PREFILL_CHUNK
from mixchat.planning.expectation import IN_USE, MISSING_EXPERTS_S, PROMPT, expected_distinct
from mixchat.planning.gpu_costs import (
    MISSING_EXPERT_S,
    MISSING_LAYER_S,
    PROMPT_EXPERT_S,
    PROMPT_LAYER_S,
    TOKEN_S,
)
from mixchat.weights.format.blueprint import Blueprint, Quantization

(CARD,) = GPU_SPEEDS.gpus
HEAD_S = BLUEPRINT.head.nbytes / BLUEPRINT.mean_expert * 0.003
slots = st.integers(2, 256)


def test_hit_rates_grow_with_slots_up_to_all():
    rates = [estimate(count).hit_rate for count in (2, *range(16, 257, 16))]
    assert all(fewer <= more for fewer, more in itertools.pairwise(rates))
    assert rates[0] < 0.01
    assert rates[-1] == 1.0 > rates[-2]


def test_ram_behind_a_gpu_holds_other_experts_than_the_gpu_does():
    both = estimate(100, 92, device=GPU)
    assert (both.hit_rate, both.host_hit_rate) == (estimate(100).hit_rate, estimate(192).hit_rate)
    spread = estimate(100, 56, device=GPU, other_slots=(60, 40))
    one = estimate(200, 56, device=GPU)
    assert (spread.hit_rate, spread.host_hit_rate) == (one.hit_rate, one.host_hit_rate)


@pytest.mark.parametrize(("experts", "chosen"), [(3, 2), (32, 4), (128, 8)])
def test_experts_of_other_shapes_than_mixtral_s_hit_by_chance(experts, chosen):
    """Eight of 64 share an expert by chance more often than Mixtral's table says."""
    config = replace(CONFIG, num_local_experts=experts, num_experts_per_tok=chosen)
    assert estimate(8 * experts, blueprint=Blueprint(config, Quantization())).hit_rate == 0.25


@pytest.mark.parametrize(("tokens", "experts"), [(1, 2), (2, 3.5), (20, 7.975), (1000, 8)])
def test_distinct_experts_of_several_tokens(tokens, experts):
    assert expected_distinct(CONFIG, tokens) == pytest.approx(experts, abs=0.001)


def test_on_a_cpu_that_holds_all_a_token_is_only_computed():
    token = estimate().token
    assert token.computing == pytest.approx(32 * 0.001 + 64 * 0.003 + HEAD_S)
    assert token.seconds == token.computing


def test_a_layer_on_a_cpu_takes_longer_if_any_expert_may_be_missing():
    """Python asks for each expert then. Plans for most experts in memory were half too high."""
    missing = estimate(250).token.computing - estimate(256).token.computing
    assert missing == pytest.approx(32 * MISSING_EXPERTS_S)


def test_experts_are_read_more_slowly_while_the_cpu_computes_but_not_for_the_first_layers():
    """Half of what could be read counted as hidden, whatever the count of layers. Plans for 48
    layers of Qwen3 were a fifth too slow, and for 12 layers a fifth too fast."""
    half = estimate(128)
    token, read = half.token, 64 * (1 - half.hit_rate)
    assert token.reading == pytest.approx(read * BLUEPRINT.mean_expert / (IN_USE * 3e9))
    in_layers = (1 - 6 / 32) * (token.computing - HEAD_S) / token.computing
    assert token.hidden == pytest.approx(in_layers * min(token.computing * 2 / 3, token.reading))
    few = Blueprint(replace(CONFIG, num_hidden_layers=6), Quantization())
    assert estimate(24, blueprint=few).token.hidden == 0


def test_first_layers_without_experts_count_at_the_pace_of_an_expert():
    """They cost no time at all once."""
    config = replace(CONFIG, first_k_dense_replace=2, dense_intermediate_size=6 * 1024)
    first = Blueprint(config, Quantization(attention="int8"))
    size = 2 * sum(matrix.nbytes for matrix in first.dense_matrices(0))
    computing = 30 * (0.001 + 2 * 0.003) + size / first.mean_expert * 0.003 + HEAD_S
    found = estimate(first.expert_count, blueprint=first)
    assert found.token.computing == pytest.approx(computing)


@pytest.mark.parametrize("held", [256, 100])
def test_answers_at_once_share_experts_and_each_is_slower_than_one_alone(held):
    """With several answers `plan` printed one speed, as if each were alone."""
    known = replace(SPEEDS, expert_seconds={1: 0.003, 64: 0.03})
    one, four = (
        estimate(held, speeds=known, answers=answers).tokens_per_second for answers in (1, 4)
    )
    assert four < one < 4 * four


def test_a_gpu_reads_what_it_holds_while_the_cpu_computes_the_rest():
    """Missing experts were copied to the GPU, which takes 8 times as long as to compute them."""
    everything, part = estimate(device=GPU).token, estimate(64, 64, device=GPU)
    size = BLUEPRINT.mean_expert
    misses = 64 * (1 - part.hit_rate)
    assert everything.waiting == everything.reading == 0
    host_s = 32 * (CARD.round_trip + MISSING_LAYER_S) + misses * MISSING_EXPERT_S
    assert part.token.waiting == pytest.approx(misses * 0.003 + host_s)
    saved = misses * size / 4e11 - 4 * 32 * CARD.kernel  # copies to the host, and zeros
    assert part.token.computing == pytest.approx(everything.computing - saved, rel=1e-6)
    assert part.token.copying == 0
    read = 64 * (1 - part.host_hit_rate)
    assert part.token.reading == pytest.approx(read * size / (IN_USE * 3e9))


def test_answers_on_a_gpu_take_turns_and_share_what_is_read_from_the_disk():
    """They were planned as one pass, for which there is no graph."""
    one, two = (estimate(64, 64, device=GPU, answers=answers).token for answers in (1, 2))
    assert (two.computing, two.waiting) == (2 * one.computing, 2 * one.waiting)
    assert one.reading < two.reading < 2 * one.reading


def test_with_all_in_vram_a_token_takes_its_bytes_its_kernels_and_one_wait():
    """Every type had 300 GB/s, so that a plan for any card and any bits was the same. Kernels and
    sampling did not count, which promised 2.4 times the published speed of Qwen3 on an H100."""
    kernels = (10 * 32 + 4) * CARD.kernel + CARD.round_trip + TOKEN_S
    seconds = estimate(device=GPU).token.seconds
    faster = replace(CARD, memory=8e11)
    twice = estimate(device=GPU, speeds=replace(GPU_SPEEDS, gpus=(faster,))).token.seconds
    assert twice == pytest.approx((seconds - kernels) / 2 + kernels)


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize(("bits", "size"), [(None, 2), (8, 1 + 4 / 128)])
def test_a_token_reads_the_keys_and_values_of_its_context(device, bits, size):
    """They did not count: 3.7 ms of Qwen3's tokens after 8,192 tokens on an RTX 4060."""
    known = replace(estimate(device=device), kv_bits=bits)
    short, long = (replace(known, context=tokens).token.computing for tokens in (128, 8192))
    seen = 32 * 2 * 8 * 128 * size * (8192 - 128)
    rate = 4e11 if device == GPU else BLUEPRINT.mean_expert / 0.003
    assert long - short == pytest.approx(seen / rate)


def test_a_second_gpu_takes_its_share_at_its_own_speed():
    one, two = estimate(device=GPU), estimate(128, device=GPU, other_slots=(128,))
    assert two.token.computing == pytest.approx(one.token.computing + CARD.round_trip)
    slow = replace(CARD, memory=2e11)
    speeds = replace(GPU_SPEEDS, gpus=(*GPU_SPEEDS.gpus, slow))
    mixed = estimate(128, device=GPU, other_slots=(128,), speeds=speeds)
    assert mixed.token.computing == pytest.approx(1.5 * two.token.computing, rel=0.05)


def test_a_prompt_is_slower_with_half_of_the_experts_and_slowest_with_none():
    found = [estimate().prompt(64), estimate(128).prompt(64), estimate(128).prompt(64, cold=True)]
    seconds = [cost.seconds for cost in found]
    assert seconds == sorted(seconds)
    assert found[0].reading == 0
    assert found[1].reading == pytest.approx(found[2].reading / 2)
    # All experts with 16 rows and all layers with 64 rows, each of which takes 2/7 ms more.
    slowdown = (0.003 + 63 * 0.002 / 7) / 0.003
    computing = 256 * (0.003 + 15 * 0.002 / 7) + 32 * slowdown * 0.001 + HEAD_S
    assert found[0].seconds == pytest.approx(computing, rel=1e-3)


def test_a_prompt_computes_while_it_reads_so_the_longer_of_both_counts():
    """Half of it was said to overlap. The experts of the layers ahead are read in the meantime."""
    steady = replace(SPEEDS, disk_busy=3e9)
    cost = estimate(speeds=steady).prompt(PROMPT, cold=True)
    assert cost.seconds == pytest.approx(max(cost.reading, cost.computing))


def test_a_gpu_has_the_experts_of_a_prompt_copied():
    cost = estimate(128, 128, device=GPU).prompt(PROMPT)
    assert cost.copying > 0 == cost.reading
    cold = estimate(128, 128, device=GPU).prompt(PROMPT, cold=True)
    assert cold.copying == pytest.approx(2 * cost.copying)
    assert cold.copying == pytest.approx(cold.reading * IN_USE * 3e9 / 2e10)
    assert estimate(device=GPU).prompt(PROMPT).copying == 0


def test_a_prompt_on_a_gpu_takes_at_least_the_time_in_which_the_host_starts_it():
    """Only kernels counted, which take an H100 a third of the time."""
    fast = replace(CARD, memory=1e15, compute=1e18, lanes=1e18)
    cost = estimate(device=GPU, speeds=replace(GPU_SPEEDS, gpus=(fast,))).prompt(512)
    host_s = 32 * PROMPT_LAYER_S + 256 * PROMPT_EXPERT_S
    assert cost.seconds == pytest.approx(host_s + CARD.round_trip, rel=1e-3)
    assert estimate(device=GPU).prompt(512).seconds > cost.seconds


@pytest.mark.parametrize("device", [CPU, GPU])
def test_each_chunk_of_a_prompt_reads_the_experts_again(device):
    one, two = (
        estimate(device=device).prompt(n * PREFILL_CHUNK, cold=True).reading for n in (1, 2)
    )
    assert two == pytest.approx(2 * one)


def test_without_figures_of_the_disk_only_what_needs_none_has_a_cost():
    whole, half = estimate(speeds=BLIND), estimate(128, speeds=BLIND)
    assert whole.token == estimate().token
    assert whole.prompt(64) == estimate().prompt(64)
    assert (half.token, half.tokens_per_second, half.prompt(64)) == (None, None, None)


@given(slots, slots, st.integers(0, 254))
def test_more_experts_in_memory_never_cost_more(one, other, host):
    fewer, more = sorted((one, other))
    assert estimate(more).token.seconds <= estimate(fewer).token.seconds
    on_gpu = [estimate(count, host, device=GPU).token.seconds for count in (fewer, more)]
    assert on_gpu[1] <= on_gpu[0] + 1e-12
