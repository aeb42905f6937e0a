"""The speed that is predicted: hit rates without a model, and the cost of tokens with them."""

import itertools
from dataclasses import replace

import pytest
import torch
from planning_tools import BLUEPRINT, CONFIG, CPU, GPU, GPU_SPEEDS, SPEEDS

from mixchat.experts.placement import Placement
from mixchat.planning.expectation import MISSING_EXPERTS_S, TokenCost, expect, size_of
from mixchat.planning.gpu_speeds import SYNC_S
from mixchat.planning.machine_speeds import IN_USE, MachineSpeeds, Measurement
from mixchat.weights.format.blueprint import Blueprint, Quantization


def on_cpu(slots: int) -> Placement:
    return Placement(slots, 0, 256)


def hit_rates(
    blueprint: Blueprint, device: torch.device, placement: Placement
) -> tuple[float, float]:
    found = expect(blueprint, device, Measurement(0.0, (GPU_SPEEDS,)), placement)
    return found.hit_rate, found.host_hit_rate


def held_together(blueprint: Blueprint, device: torch.device, placement: Placement) -> int:
    return expect(blueprint, device, Measurement(0.0, (GPU_SPEEDS,)), placement).held


def decode_cost(
    blueprint: Blueprint, device: torch.device, speeds: MachineSpeeds, placement: Placement
) -> TokenCost | None:
    return expect(blueprint, device, Measurement(0.0, (speeds,)), placement).cost


def test_hit_rates_grow_with_slots_up_to_all():
    rates = [hit_rates(BLUEPRINT, CPU, on_cpu(slots))[0] for slots in (2, *range(16, 257, 16))]
    assert all(fewer <= more for fewer, more in itertools.pairwise(rates))
    assert rates[0] < 0.01
    assert rates[-1] == 1.0
    assert all(rate < 1 for rate in rates[:-1])


def test_ram_behind_a_gpu_holds_other_experts_than_the_gpu_does():
    rate, host_rate = hit_rates(BLUEPRINT, GPU, Placement(100, 92, 256))
    assert rate == hit_rates(BLUEPRINT, CPU, on_cpu(100))[0]
    assert host_rate == hit_rates(BLUEPRINT, CPU, on_cpu(192))[0]
    assert held_together(BLUEPRINT, GPU, Placement(100, 92, 256)) == 192
    assert held_together(BLUEPRINT, GPU, Placement(200, 92, 256)) == 256


@pytest.mark.parametrize(("experts", "chosen"), [(3, 2), (32, 4), (128, 8)])
def test_experts_of_other_shapes_than_mixtral_s_hit_by_chance(experts, chosen):
    """Eight of 64 share an expert by chance more often than Mixtral's table says."""
    config = replace(CONFIG, num_local_experts=experts, num_experts_per_tok=chosen)
    placement = Placement(8 * experts, 0, 32 * experts)
    assert hit_rates(Blueprint(config, Quantization()), CPU, placement)[0] == 0.25


def test_a_decoded_token_is_computed_with_what_is_not_at_hand_read():
    found = decode_cost(BLUEPRINT, CPU, SPEEDS, on_cpu(192))
    head = 32000 * 4096 * 2 / BLUEPRINT.expert.stride
    layer_s = 0.001 + MISSING_EXPERTS_S
    computing = 32 * layer_s + (64 + head) * 0.003
    assert found.computing == pytest.approx(computing)
    assert found.read == pytest.approx(64 * (1 - hit_rates(BLUEPRINT, CPU, on_cpu(192))[0]))
    assert found.reading == pytest.approx(found.read * BLUEPRINT.expert.stride / (IN_USE * 3e9))


def test_layers_on_two_gpus_are_computed_one_after_the_other():
    one = decode_cost(BLUEPRINT, GPU, GPU_SPEEDS, Placement(256, 0, 256))
    two = decode_cost(BLUEPRINT, GPU, GPU_SPEEDS, Placement(128, 0, 256, other_slots=(128,)))
    assert two.computing == pytest.approx(one.computing + SYNC_S)
    slow = replace(GPU_SPEEDS.gpus[0], memory=GPU_SPEEDS.gpus[0].memory / 2)
    speeds = replace(GPU_SPEEDS, gpus=(GPU_SPEEDS.gpus[0], slow))
    mixed = decode_cost(BLUEPRINT, GPU, speeds, Placement(128, 0, 256, other_slots=(128,)))
    assert 1.4 * two.computing < mixed.computing < 1.7 * two.computing


def test_slots_of_all_gpus_count_for_the_hit_rate():
    spread = Placement(100, 56, 256, other_slots=(60, 40))
    assert hit_rates(BLUEPRINT, GPU, spread) == hit_rates(BLUEPRINT, GPU, Placement(200, 56, 256))
    assert held_together(BLUEPRINT, GPU, spread) == 256


@pytest.mark.parametrize("held", [256, 100])
def test_answers_at_once_share_experts_and_each_is_slower_than_one_alone(held):
    """With several answers `plan` printed one speed, as if each were alone."""
    known = Measurement(0.0, (replace(SPEEDS, expert_seconds={1: 0.003, 64: 0.03}),))
    one, four = (expect(BLUEPRINT, CPU, known, on_cpu(held), answers) for answers in (1, 4))
    assert one == expect(BLUEPRINT, CPU, known, on_cpu(held))
    assert one.speed == one.together
    assert four.together.high == 4 * four.speed.high
    assert four.speed.high < one.speed.high < four.together.high


def test_the_cost_of_a_pass_is_that_of_the_experts_that_its_answers_use():
    slow_experts = replace(SPEEDS, expert_seconds={1: 0.01, 1000: 0.01}, layer_seconds=0.0)
    known = Measurement(0.0, (slow_experts,))
    costs = [expect(BLUEPRINT, CPU, known, on_cpu(256), answers).cost for answers in (1, 2)]
    shape = size_of(BLUEPRINT)
    head = 0.01 * shape.head / shape.expert
    assert [cost and cost.seconds for cost in costs] == [
        pytest.approx(32 * 0.01 * distinct + head, rel=0.01) for distinct in (2, 3.5)
    ]


def test_attention_and_dense_part_of_the_first_layers_are_counted_if_they_have_no_experts():
    first = replace(CONFIG, first_k_dense_replace=2, dense_intermediate_size=6 * 1024)
    blueprint = Blueprint(first, Quantization(attention="int8"))
    layer = sum(spec.rows * spec.columns for spec in blueprint.dense_matrices(0))
    size = size_of(blueprint)
    assert size.layers == first.num_hidden_layers - 2
    assert size.first_layers == pytest.approx(2 * layer * 8.25 / 8)
    assert size_of(BLUEPRINT).first_layers == 0
