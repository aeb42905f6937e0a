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
from mixchat.planning.compute_speed import Effort, ExpertTimer, PromptProducts, layer_probe
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
    compute = layer_probe(blueprint)
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


def test_the_limit_of_prompts_counts_each_type_by_its_operations(monkeypatch):
    """Products in bf16 were the limit of prompts in integers, which reached 150% of it."""
    monkeypatch.setattr(compute_speed, "_PRODUCT_ROWS", 128)
    monkeypatch.setattr(compute_speed, "_PRODUCT_COLUMNS", 128)
    shapes: list[torch.Size] = []

    def seconds_of(run, device, tries):
        shapes.append(run().shape)
        return [5.0, float(len(shapes))]  # 1 s for the first type, 2 s for the second

    monkeypatch.setattr(compute_speed, "seconds_of", seconds_of)
    products = PromptProducts({"nf4": 3_000, "int8": 1_000}, torch.bfloat16)
    operations = 2 * 128 * 128 * 512
    assert products.rate() == pytest.approx(4_000 / (3_000 / operations + 1_000 * 2 / operations))
    assert shapes == [(512, 128)] * 2


@pytest.mark.parametrize(
    ("types", "first", "expected"),
    [
        (["full_attention"] * 8, 2, [0, 0, 0, 0]),
        ((["conv"] * 3 + ["full_attention"]) * 12, 0, [0, 0, 0, 3]),
        ((["conv"] * 5 + ["full_attention"]) * 5, 0, [0, 0, 0, 0, 0, 5]),
        (["conv"] * 47 + ["full_attention"], 1, [0] * 8 + [46]),
    ],
)
def test_layers_of_several_forms_are_measured_as_often_as_the_model_has_them(
    blueprint, types, first, expected
):
    features = {"num_hidden_layers": len(types), "layer_types": tuple(types), "conv_L_cache": 3}
    features |= {"first_k_dense_replace": first, "dense_intermediate_size": 64}
    model = Blueprint(replace(blueprint.config, **features), blueprint.quantization)
    assert compute_speed._mixture(model) == expected
