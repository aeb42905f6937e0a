"""The probe takes a token through all of a layer but its experts, and costs what a layer costs."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mixchat.engine.attention import Attention
from mixchat.engine.model import Block
from mixchat.experts.compute import RowExperts
from mixchat.kernels.compile import kernels_available
from mixchat.planning import compute_speed
from mixchat.planning.compute_speed import Effort, ExpertTimer, layer_probe
from mixchat.weights.format.blueprint import Blueprint
from mixchat.weights.format.installed_model import InstalledModel
from mixchat.weights.matrix.linear import LinearSpec

CPU = torch.device("cpu")


@pytest.fixture
def blueprint(tiny_model: Path) -> Blueprint:
    with InstalledModel(tiny_model) as installed:
        return installed.blueprint


def test_each_call_takes_one_token_through_the_next_of_several_layers(blueprint, monkeypatch):
    layers: list[int] = []
    outputs: list[torch.Tensor] = []
    call = Block.__call__

    def watch(block, x, *rest):
        layers.append(id(block))
        outputs.append(call(block, x, *rest))
        return outputs[-1]

    monkeypatch.setattr(Block, "__call__", watch)
    compute = layer_probe(blueprint, CPU)
    for _ in range(2 * compute_speed._COPIES):
        compute()
    assert len(set(layers)) == compute_speed._COPIES
    assert layers[: compute_speed._COPIES] == layers[compute_speed._COPIES :]
    assert {output.shape for output in outputs} == {(1, blueprint.config.hidden_size)}


def test_it_computes_with_ordinary_numbers(blueprint, monkeypatch):
    """Numbers that are not ordinary can slow a CPU; fresh memory may hold any."""
    outputs: list[torch.Tensor] = []
    call, empty, new_empty = Block.__call__, torch.empty, torch.Tensor.new_empty

    def watch(block, *arguments):
        outputs.append(call(block, *arguments))
        return outputs[-1]

    def spoiled(tensor):
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.fill_(-1)

    def garbage(*shape, **how):
        return spoiled(empty(*shape, **how))

    def new_garbage(like, *shape, **how):
        return spoiled(new_empty(like, *shape, **how))

    monkeypatch.setattr(Block, "__call__", watch)
    monkeypatch.setattr(torch, "empty", garbage)
    monkeypatch.setattr(torch.Tensor, "new_empty", new_garbage)
    layer_probe(blueprint, CPU)()
    assert outputs[0].isfinite().all()


def test_it_attends_to_the_tokens_before_however_often_it_is_called(blueprint, monkeypatch):
    before: list[int] = []
    attend = Attention.__call__

    def watch(attention, x, cache, **how):
        before.append(cache.length)
        return attend(attention, x, cache, **how)

    monkeypatch.setattr(Attention, "__call__", watch)
    compute = layer_probe(blueprint, CPU)
    for _ in range(3):
        compute()
    assert before == [compute_speed._CONTEXT] * 3


@pytest.mark.parametrize("attention", ["none", "int8", "nf4"])
def test_its_attention_is_of_the_models_shape_and_kind(blueprint, monkeypatch, attention):
    built: list[LinearSpec] = []
    build = LinearSpec.build

    def watch(spec, tensors, **how):
        built.append(spec)
        return build(spec, tensors, **how)

    monkeypatch.setattr(LinearSpec, "build", watch)
    how = replace(blueprint.quantization, attention=attention)
    changed = replace(blueprint, quantization=how)
    layer_probe(changed, CPU)()
    used = changed.computed_on(CPU)
    assert built == [used.qkv(0), used.o(0)] * compute_speed._COPIES
    assert {spec.quant_type for spec in built} == {attention}


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

    def watch(program, x, experts):
        counts.append(len(experts))
        return call(program, x, experts)

    monkeypatch.setattr(RowExperts, "__call__", watch)
    seconds = ExpertTimer(blueprint, CPU, Effort(pool_bytes=0, seconds=0.01)).seconds()
    assert seconds[1] > 0
    assert set(counts) == (set() if mixed else {blueprint.config.num_experts_per_tok})
