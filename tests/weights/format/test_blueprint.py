"""The block of an expert, with and without biases."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from mixchat.base.errors import CheckpointError
from mixchat.base.model_config import ModelConfig
from mixchat.base.rope_parameters import RopeParameters
from mixchat.install.known_models import KNOWN
from mixchat.weights.families.read_config import read_config
from mixchat.weights.format.blueprint import Blueprint, Quantization
from mixchat.weights.matrix.quant_type import QuantType

KINDS: tuple[QuantType, ...] = ("trellis3", "nf4", "none")


def blueprint(
    hidden: int, inner: int, kind: QuantType, *, bias: bool, dtype: torch.dtype
) -> Blueprint:
    config = ModelConfig(
        "any", 97, hidden, inner, 2, 4, 2, 16, 8, 2, 128, 1e-5, RopeParameters(1e4), moe_bias=bias
    )
    config.check()
    return Blueprint(config, Quantization(kind, dtype=dtype))


@settings(max_examples=60)
@given(
    st.integers(1, 4).map(lambda number: 64 * number),
    st.integers(1, 40).map(lambda number: 2 * number),
    st.sampled_from(KINDS),
    st.booleans(),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 2**31),
)
def test_a_block_of_any_size_holds_an_expert_in_place(hidden, inner, kind, bias, dtype, seed):
    form = blueprint(hidden, inner, kind, bias=bias, dtype=dtype).expert
    names = [spec.name for spec in form.tensors(3)]
    assert ("3.w13.bias" in names) == ("3.w2.bias" in names) == bias
    assert sum(spec.nbytes for spec in form.tensors(3)) == form.stride
    assert form.stride % 4096 == 0
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    weights = (form.gate_up, random(2 * inner, hidden)), (form.down, random(hidden, inner))
    biases = [random(spec.rows) if bias else None for spec, _ in weights]
    tensors = [
        spec.encode(weight, bias=added)
        for (spec, weight), added in zip(weights, biases, strict=True)
    ]
    block = torch.zeros(form.stride, dtype=torch.uint8)
    expert = form.build(block)  # before its bytes are there
    data = torch.cat([each.view(-1).view(torch.uint8) for each in [*tensors[0], *tensors[1]]])
    assert len(data) == form.nbytes
    block[: form.nbytes] = data
    x = random(3, hidden).to(dtype)
    gate_up, down = form.gate_up.build(tensors[0]), form.down.build(tensors[1])
    assert torch.equal(expert(x), down(form.swiglu(gate_up(x))))


def coded(blueprint: Blueprint) -> dict[str, bool]:
    """Return whether each matrix of the last layer has codes."""
    expert, last = blueprint.expert, blueprint.config.num_hidden_layers - 1
    matrices = [expert.gate_up, expert.down, *blueprint.dense_matrices(last), blueprint.head]
    return {matrix.name.split(".", 3)[-1]: matrix.quant_type != "none" for matrix in matrices}


@pytest.mark.parametrize(
    ("hidden", "inner", "kind", "dense"),
    [
        (64, 128, "nf4", []),
        (64, 64, "trellis3", []),
        (64, 96, "nf4", ["w2"]),  # columns of one block and a half
        (64, 96, "mxfp4", []),
        (64, 96, "trellis3", ["w13", "w2"]),  # halves of one band and a half
        (64, 48, "mxfp4", ["w13", "w2"]),
        (96, 64, "nf4", ["w13", "self_attn.qkv_proj", "lm_head"]),
        (96, 64, "mxfp4", ["self_attn.qkv_proj", "lm_head"]),
    ],
)
def test_a_matrix_whose_shape_does_not_fit_its_type_is_dense(hidden, inner, kind, dense):
    model = blueprint(hidden, inner, kind, bias=False, dtype=torch.bfloat16)
    both = replace(model.quantization, attention="int8", head="int8")
    found = coded(replace(model, quantization=both))
    assert [name for name, has_codes in found.items() if not has_codes] == dense


def test_a_tied_head_that_does_not_fit_its_type_is_the_embedding():
    model = blueprint(96, 64, "nf4", bias=False, dtype=torch.bfloat16)
    config = replace(model.config, tie_word_embeddings=True)
    tied = Blueprint(config, replace(model.quantization, head="int8"))
    assert tied.head is None
    assert not any("lm_head" in spec.name for spec in tied.shared_tensors())


def test_every_matrix_of_the_known_models_fits_every_type():
    parts: tuple[tuple[QuantType, QuantType], ...] = (
        *((experts, "int8") for experts in ("nf4", "mxfp4", "trellis2", "trellis3")),
        *(("nf4", dense) for dense in ("nf4", "int6")),
    )
    for name, known in KNOWN.items():
        config = read_config(known.config)
        for experts, dense in parts:
            model = Blueprint(config, Quantization(experts, attention=dense, head=dense))
            assert all(coded(model).values()), (name, experts, dense)
            assert all(spec.quant_type == dense for spec in model.shared_matrices.values())


@pytest.mark.parametrize("bias", [False, True])
def test_only_models_with_biases_have_one_of_their_router(bias):
    model = blueprint(64, 64, "nf4", bias=bias, dtype=torch.bfloat16)
    specs = {spec.name: spec for spec in model.shared_tensors()}
    name = "model.layers.1.block_sparse_moe.gate.bias"
    assert (name in specs) == bias
    if bias:
        assert specs[name] == model.router(1)["bias"]
        assert specs[name].shape == (8,)
        assert replace(specs[name], name="") == replace(model.router(0)["bias"], name="")


@pytest.mark.parametrize(
    "name", ["instruct", "qwen3", "gpt-oss", "olmoe", "granite", "mellum2", "qwen3-coder-next"]
)
def test_parameters_are_counted_as_transformers_counts_them(name):
    raw = KNOWN[name].config
    with torch.device("meta"):
        oracle = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw))
    count = sum(parameter.numel() for parameter in oracle.parameters())
    for quantization in (Quantization("nf4", head="int8"), Quantization("none")):
        assert Blueprint(read_config(raw), quantization).parameter_count == count


LINEAR = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
LATENT = {"kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 24}
# The features of layers with different mixers, and the layers of each form.
MIXED = {
    "linear": (
        {"layer_types": (*["linear_attention"] * 3, "full_attention") * 2, **LINEAR},
        [6, 2],
    ),
    "conv": ({"layer_types": ("conv", "full_attention") * 4, "conv_L_cache": 3}, [4, 4]),
    "latent": ({**LATENT, "first_k_dense_replace": 1, "dense_intermediate_size": 64}, [1, 7]),
    "wide full layers": (
        {"layer_types": (*["sliding_attention"] * 3, "full_attention") * 2, "global_head_dim": 64},
        [6, 2],
    ),
    "windows": ({"layer_types": ("sliding_attention", "full_attention") * 4}, [8]),
}


@pytest.mark.parametrize("name", MIXED)
def test_layers_are_counted_by_the_forms_of_their_matrices(name):
    features, counts = MIXED[name]
    base = blueprint(64, 64, "nf4", bias=False, dtype=torch.bfloat16)
    model = replace(base, config=replace(base.config, num_hidden_layers=8, **features))
    model.config.check()
    assert [*model.layer_forms.values()] == counts
    sizes = [
        sum(tensor.nbytes for matrix in model.dense_matrices(layer) for tensor in matrix.tensors)
        for layer in range(model.config.first_k_dense_replace, 8)
    ]
    assert model.mean_layer == sum(sizes) // len(sizes)
    names = [matrix.name for matrix in model.typical_matrices]
    for layer in model.layer_forms:
        assert {matrix.name for matrix in model.dense_matrices(layer)} <= {*names}
    stored = [spec.name for spec in model.shared_tensors()]
    assert len(stored) == len({*stored})
    for layer in range(8):
        assert {spec.name for spec in model.mixer(layer).all_tensors()} <= {*stored}


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (
            {"layer_types": ("linear_attention",) * 2, **LINEAR, "linear_num_key_heads": 0},
            "missing",
        ),
        ({"layer_types": ("linear_attention",) * 2, **LINEAR, "linear_num_key_heads": 3}, "share"),
        ({"layer_types": ("conv",) * 2}, "conv_L_cache"),
        ({**LATENT, "v_head_dim": 0}, "v_head_dim"),
        ({**LATENT, "qk_rope_head_dim": 7}, "pairs"),
        ({"num_global_key_value_heads": 3}, "share"),
        ({"global_head_dim": 33}, "odd"),
    ],
)
def test_numbers_of_a_mixer_that_do_not_fit_are_refused(features, message):
    base = blueprint(64, 64, "nf4", bias=False, dtype=torch.bfloat16).config
    with pytest.raises(CheckpointError, match=message):
        replace(base, **features).check()
