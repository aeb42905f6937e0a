"""The budget of a token on a GPU, for every type of codes."""

import gpu_budget
import pytest

from mixchat.planning.cards import find_card
from mixchat.planning.gpu_costs import GPUCosts
from mixchat.planning.machine_speeds import GPUSpeeds
from mixchat.weights.matrix.linear import TYPES


@pytest.mark.parametrize("quant_type", TYPES)
def test_a_token_is_one_graph_and_one_wait_if_vram_holds_all_experts(quant_type):
    row = gpu_budget.counted(quant_type, 1.0)
    assert row.kernels_a_layer <= 12
    assert row.launches <= 4  # the row and its position come before the graph
    assert row.syncs == 1


@pytest.mark.parametrize(
    ("config", "kernels"),
    [
        (gpu_budget.TINY, 9),
        (gpu_budget.TINY_STATES, 11),
        (gpu_budget.TINY_LATENTS, 15),
        (gpu_budget.TINY_LATENTS | {"q_lora_rank": None}, 13),
        (gpu_budget.TINY_CONVOLUTIONS, 8),
        (gpu_budget.TINY_NORMS, 17),
    ],
    ids=["attention", "states", "latents", "plain queries", "convolutions", "norms"],
)
def test_a_layer_of_each_mixer_has_few_kernels(config, kernels):
    row = gpu_budget.counted("nf4", 1.0, config)
    assert row.kernels_a_layer == kernels
    assert planned_kernels(config) - kernels in (0, 1)  # which merges splits of many keys
    assert row.launches <= 4
    assert row.syncs == 1


def planned_kernels(config):
    """The kernels of one more layer, by the plan."""
    speeds = GPUSpeeds.of_card(find_card("RTX 3090"))
    models = (
        gpu_budget.blueprint_of("nf4", gpu_budget.of_layers(config, layers)) for layers in (1, 2)
    )
    one, two = (GPUCosts(model, speeds).kernels for model in models)
    return two - one


# The types differ in the kernels of the test above. All types have the same graphs of a layer.
@pytest.mark.parametrize("quant_type", ["none", "int8", "nf4", "trellis3"])
def test_a_layer_is_two_graphs_and_one_wait_if_ram_holds_half_of_the_experts(quant_type):
    row = gpu_budget.counted(quant_type, 0.5)
    assert row.launches <= 3
    assert row.syncs == 1


@pytest.mark.parametrize("quant_type", TYPES)
def test_kernels_read_each_weight_once(quant_type):
    assert 1 <= gpu_budget.bytes_read(quant_type) <= 1.05
