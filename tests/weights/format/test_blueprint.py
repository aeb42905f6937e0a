"""The block of an expert, with and without biases."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from mixchat.base.model_config import ModelConfig, RopeParameters
from mixchat.weights.families.read_config import read_config
from mixchat.weights.format.blueprint import Blueprint, Quantization
from mixchat.weights.known_models import KNOWN
from mixchat.weights.matrix.linear import Layout
from mixchat.weights.matrix.quant_type import QuantType

KINDS: tuple[QuantType, ...] = ("trellis3", "nf4", "none")


def blueprint(
    hidden: int, inner: int, kind: QuantType, layout: Layout, *, bias: bool, dtype: torch.dtype
) -> Blueprint:
    config = ModelConfig(
        "any", 97, hidden, inner, 2, 4, 2, 16, 8, 2, 128, 1e-5, RopeParameters(1e4), moe_bias=bias
    )
    config.check()
    return Blueprint(config, Quantization(kind, layout, dtype=dtype))


@settings(max_examples=60)
@given(
    st.integers(1, 4).map(lambda number: 64 * number),
    st.integers(1, 40).map(lambda number: 2 * number),
    st.sampled_from(KINDS),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 2**31),
)
def test_a_block_of_any_size_holds_an_expert_in_place_and_can_be_converted(
    hidden, inner, kind, bias, dtype, seed
):
    old, new = (
        blueprint(hidden, inner, kind, layout, bias=bias, dtype=dtype).expert
        for layout in ("bitsandbytes", "cpu-packed")
    )
    names = [spec.name for spec in old.tensors(3)]
    assert ("3.w13.bias" in names) == ("3.w2.bias" in names) == bias
    assert sum(spec.nbytes for spec in old.tensors(3)) == old.stride == new.stride
    assert old.stride % 4096 == 0
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    weights = (old.gate_up, random(2 * inner, hidden)), (old.down, random(hidden, inner))
    biases = [random(spec.rows) if bias else None for spec, _ in weights]
    tensors = [
        spec.encode(weight, bias=added)
        for (spec, weight), added in zip(weights, biases, strict=True)
    ]
    block = torch.zeros(old.stride, dtype=torch.uint8)
    expert = old.build(block)  # before its bytes are there
    data = torch.cat([each.view(-1).view(torch.uint8) for each in [*tensors[0], *tensors[1]]])
    assert len(data) == old.nbytes
    block[: old.nbytes] = data
    x = random(3, hidden).to(dtype)
    gate_up, down = old.gate_up.build(tensors[0]), old.down.build(tensors[1])
    assert torch.equal(expert(x), down(old.swiglu(gate_up(x))))
    before = block.clone()
    old.convert(block, new)
    new.convert(block, old)
    assert torch.equal(block, before)


@pytest.mark.parametrize("bias", [False, True])
def test_only_models_with_biases_have_one_of_their_router(bias):
    model = blueprint(64, 64, "nf4", "bitsandbytes", bias=bias, dtype=torch.bfloat16)
    specs = {spec.name: spec for spec in model.shared_tensors()}
    name = "model.layers.1.block_sparse_moe.gate.bias"
    assert (name in specs) == bias
    if bias:
        assert specs[name] == model.gate_bias(1)
        assert specs[name].shape == (8,)
        assert replace(specs[name], name="") == replace(model.gate_bias(0), name="")


@pytest.mark.parametrize("name", ["instruct", "qwen3", "gpt-oss", "olmoe", "granite", "mellum2"])
def test_parameters_are_counted_as_transformers_counts_them(name):
    raw = KNOWN[name].config
    with torch.device("meta"):
        oracle = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw))
    count = sum(parameter.numel() for parameter in oracle.parameters())
    for quantization in (Quantization("nf4", head="int8"), Quantization("none")):
        assert Blueprint(read_config(raw), quantization).parameter_count == count
