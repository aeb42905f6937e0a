"""The probe takes a token through all of a layer but its experts, and costs what a layer costs."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mixchat.engine.caches.kv_cache import KVCache
from mixchat.engine.caches.paged_cache import PagedKVCache
from mixchat.experts.compute import RowExperts
from mixchat.kernels.cpu.compile import kernels_available
from mixchat.planning import compute_speed
from mixchat.planning.compute_speed import Effort, ExpertTimer, layer_probe
from mixchat.weights.format.blueprint import Blueprint
from mixchat.weights.format.installed_model import InstalledModel

CPU = torch.device("cpu")


@pytest.fixture
def blueprint(tiny_model: Path) -> Blueprint:
    with InstalledModel(tiny_model) as installed:
        return installed.blueprint


def test_each_call_takes_one_token_through_the_next_of_several_layers(blueprint, monkeypatch):
    layers: list[int] = []
    outputs: list[torch.Tensor] = []
    call = compute_speed.compute_layer

    def watch(operations, x, *rest):
        layers.append(id(operations))
        outputs.append(call(operations, x, *rest))
        return outputs[-1]

    monkeypatch.setattr(compute_speed, "compute_layer", watch)
    config = replace(blueprint.config, num_hidden_layers=6)
    compute = layer_probe(Blueprint(config, blueprint.quantization))
    for _ in range(2 * compute_speed._COPIES):
        compute()
    assert len(set(layers)) == compute_speed._COPIES
    assert layers[: compute_speed._COPIES] == layers[compute_speed._COPIES :]
    assert {output.shape for output in outputs} == {(1, blueprint.config.hidden_size)}


def test_it_attends_to_the_tokens_before_however_often_it_is_called(blueprint, monkeypatch):
    before: list[int] = []
    attend = PagedKVCache.attend

    def watch(cache: KVCache, *rows):
        before.append(cache.length)
        return attend(cache, *rows)

    compute = layer_probe(blueprint)
    monkeypatch.setattr(PagedKVCache, "attend", watch)
    for _ in range(3):
        compute()
    assert before == [compute_speed._CONTEXT] * 3


@pytest.mark.skipif(not kernels_available(), reason="the kernels need AVX2")
@pytest.mark.parametrize("mixed", [False, True])
def test_experts_for_one_row_are_measured_as_a_token_computes_them(
    make_checkpoint, install, monkeypatch, mixed
):
    """One by one they seemed to take twice as long. Experts of several forms are not alike."""
    with InstalledModel(install(make_checkpoint(intermediate_size=128))) as installed:
        blueprint = installed.blueprint
    if mixed:
        own = blueprint.quantization
        blueprint = replace(blueprint, layers=(own, replace(own, quant_type="trellis3")))
    counts: list[int] = []
    call = RowExperts.__call__

    def watch(program, x, addresses, *pairs):
        counts.append(len(addresses))
        return call(program, x, addresses, *pairs)

    monkeypatch.setattr(RowExperts, "__call__", watch)
    seconds = ExpertTimer(blueprint, Effort(pool_bytes=0, seconds=0.01)).seconds()
    assert seconds[1] > 0
    assert set(counts) == (set() if mixed else {blueprint.config.num_experts_per_tok})


def test_a_rate_of_operations_is_that_of_a_long_prompts_expert(blueprint, monkeypatch):
    """Products in bf16 were the limit of prompts in integers, which reached 150% of it."""
    asked = []
    timer = ExpertTimer(blueprint, Effort(pool_bytes=0, seconds=0.01))
    monkeypatch.setattr(timer, "mean_of", lambda run: asked.append(run()) or 2.0)
    config = blueprint.config
    weights = 3 * config.hidden_size * config.intermediate_size
    assert timer.operations_rate(exact=True) == 2 * 512 * weights / 2.0
    assert asked[0].shape == (512, config.hidden_size)


def test_layers_of_several_forms_are_measured_as_the_model_has_them(blueprint, monkeypatch):
    types = (["conv"] * 3 + ["full_attention"]) * 12
    features = {"num_hidden_layers": len(types), "layer_types": tuple(types), "conv_L_cache": 3}
    mixed = Blueprint(replace(blueprint.config, **features), blueprint.quantization)
    built: list[int] = []
    describe = compute_speed.describe

    def watch(layer, *rest):
        built.append(layer)
        return describe(layer, *rest)

    monkeypatch.setattr(compute_speed, "describe", watch)
    layer_probe(mixed)
    assert built == [*range(8)]
