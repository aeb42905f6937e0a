"""The time of prompts: the first token of a cold start, and the speed of a long one."""

from dataclasses import replace

import pytest
import torch
from planning_tools import BLUEPRINT, CONFIG, CPU, GPU, GPU_SPEEDS, SPEEDS, measured, without_disk

from mixchat.engine.chunk_sizer import PREFILL_CHUNK
from mixchat.experts.placement import Placement
from mixchat.planning.expectation import (
    PROMPT,
    FirstToken,
    expected_distinct,
    first_token,
    prompt_cost,
    prompt_speed,
)
from mixchat.planning.machine_speeds import MachineSpeeds

BLIND = without_disk(SPEEDS)
ALL, HALF = Placement(256, 0, 256), Placement(128, 0, 256)


def cold_start(
    speeds: MachineSpeeds, device: torch.device = CPU, tokens: int = PROMPT
) -> FirstToken:
    found = first_token(BLUEPRINT, device, measured(speeds), None, tokens)
    assert found is not None
    return found


@pytest.mark.parametrize(("tokens", "experts"), [(1, 2), (2, 3.5), (20, 7.975), (1000, 8)])
def test_distinct_experts_of_several_tokens(tokens, experts):
    assert expected_distinct(CONFIG, tokens) == pytest.approx(experts, abs=0.001)


def test_the_first_token_waits_for_nearly_all_of_the_model():
    found = cold_start(SPEEDS, tokens=20)
    assert found.loading > BLUEPRINT.shared_size / 3e9
    assert 254 < found.prompt.read < 256
    assert found.prompt.reading == pytest.approx(found.prompt.read * BLUEPRINT.expert.stride / 3e9)
    # Five rows an expert, of which each takes 3 ms and 2/7 ms for each row after the first.
    experts = found.prompt.read * (0.003 + 4 * 0.002 / 7)
    assert experts < found.prompt.computing < experts + 0.3
    assert found.seconds == found.loading + found.prompt.seconds
    assert found.prompt.copying == 0


def test_for_a_gpu_the_first_token_has_the_experts_copied_too():
    found = cold_start(GPU_SPEEDS, GPU)
    assert found.prompt.copied == found.prompt.read
    assert found.prompt.copying == pytest.approx(found.prompt.reading * 3e9 / 2e10)


def test_a_prompt_has_a_speed_with_all_experts_in_memory_with_half_and_with_none():
    rates = []
    for placement in (ALL, HALF, None):
        speed = prompt_speed(BLUEPRINT, CPU, measured(SPEEDS), placement, 64)
        assert speed.low == speed.high
        rates.append(speed.low)
    assert rates == sorted(rates, reverse=True)
    cost = prompt_cost(BLUEPRINT, CPU, SPEEDS, 64, missing=0, read=0)
    assert rates[0] == pytest.approx(64 / cost.seconds)
    assert cost.read == 0
    half = prompt_cost(BLUEPRINT, CPU, SPEEDS, 512, missing=0.5, read=0.5)
    assert half.read == pytest.approx(128)


def test_a_prompt_computes_while_it_reads_so_the_longer_of_both_counts():
    """Half of it was said to overlap. The experts of the layers ahead are read in the meantime."""
    reads = cold_start(SPEEDS).prompt
    assert reads.seconds == pytest.approx(reads.reading)
    fast = replace(SPEEDS, disk_bandwidth_fresh=3e12)
    computes = cold_start(fast).prompt
    assert computes.seconds == pytest.approx(computes.computing)


def test_a_loaded_model_waits_for_the_disk_only_if_experts_do_not_fit():
    whole, half = (
        first_token(BLUEPRINT, CPU, measured(SPEEDS), placement) for placement in (ALL, HALF)
    )
    assert (whole.loading, whole.prompt.read, whole.seconds) == (0, 0, whole.prompt.computing)
    assert half.prompt.read == pytest.approx(cold_start(SPEEDS).prompt.read / 2)
    assert half.seconds > whole.seconds


def test_each_chunk_of_a_prompt_reads_the_experts_again():
    one, two = (
        prompt_cost(BLUEPRINT, CPU, SPEEDS, n * PREFILL_CHUNK, missing=1, read=1) for n in (1, 2)
    )
    assert two.read == pytest.approx(2 * one.read)


def test_without_figures_of_the_disk_nothing_is_said_of_what_it_gives():
    assert first_token(BLUEPRINT, CPU, measured(BLIND), None) is None
    assert prompt_speed(BLUEPRINT, CPU, measured(BLIND), HALF) is None
    assert prompt_speed(BLUEPRINT, CPU, measured(BLIND), ALL) is not None
