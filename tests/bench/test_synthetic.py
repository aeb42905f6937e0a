"""Models with random weights and the shapes of known ones, made small."""

from itertools import islice

import pytest
import torch

from mixchat.base.errors import UsageError
from mixchat.base.options import ExpertSize, LoadOptions, SamplingOptions
from mixchat.base.safetensors import SafetensorsFile
from mixchat.bench import synthetic
from mixchat.install.known_models import KNOWN
from mixchat.install.make import quantize_options
from mixchat.loading.loader import load_engine
from mixchat.weights.format.blueprint import SHARED_FILE
from mixchat.weights.format.manifest import read_manifest

SMALL = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 16,
    "num_local_experts": 16,
}


@pytest.fixture
def small(monkeypatch):
    """Makes the shapes of a known model small, with changes. Small models count as large ones."""

    def small(name, **changes):
        config = KNOWN[name].config
        values = {key: SMALL[key] for key in SMALL if key in config}
        monkeypatch.setitem(vars(KNOWN[name]), "config", {**config, **values, **changes})

    monkeypatch.setattr(quantize_options, "_SMALL_DENSE_BYTES", 0)
    return small


@pytest.mark.parametrize(
    ("shape", "layers", "size"),
    [
        *((name, 2, ExpertSize(4.0)) for name in ("instruct", "gpt-oss", "mellum2", "granite")),
        ("instruct", 4, ExpertSize(3.2)),  # experts of several types
    ],
)
def test_a_model_of_each_shape_reads_a_prompt_and_decodes(small, tmp_path, shape, layers, size):
    small(shape)
    synthetic.write_synthetic(tmp_path / "model", layers, size, shape)
    with SafetensorsFile(tmp_path / "model" / SHARED_FILE) as file:
        for spec in file.header.specs:
            numbers = file.read(spec.name)
            assert not numbers.is_floating_point() or torch.isfinite(numbers).all(), spec.name
            assert numbers.any(), spec.name
    engine = load_engine(tmp_path / "model", LoadOptions(device="cpu", context_size=64))
    assert bool(engine.blueprint.layers) == (layers == 4)
    # NaN raises `CheckpointError`.
    tokens = engine.generate([7, 8, 9] * 8, sampling=SamplingOptions(seed=0), stop_ids=set())
    assert len([*islice(tokens, 8)]) == 8


@pytest.mark.parametrize("layers", [1, 3])
def test_a_model_has_the_first_layers_of_its_shape(layers):
    types = KNOWN["mellum2"].with_layers(layers)["layer_types"]
    assert types == KNOWN["mellum2"].config["layer_types"][:layers]


@pytest.mark.parametrize(("dense_bits", "kind"), [(None, "int8"), (6, "int6"), (16, "none")])
def test_a_layer_alone_has_the_bits_of_the_whole_model(tmp_path, small, dense_bits, kind):
    """The head is a larger part of a token's bytes if there are fewer layers."""
    small("instruct", intermediate_size=512, vocab_size=640)
    synthetic.write_synthetic(tmp_path / "model", 1, dense_bits=dense_bits)
    quantization = read_manifest(tmp_path / "model").quantization
    assert quantization["attention"] == quantization["head"] == kind


def test_experts_that_come_in_mxfp4_have_no_other_bits(tmp_path):
    with pytest.raises(UsageError, match="gpt-oss has experts in 4 bits, not 3"):
        synthetic.write_synthetic(tmp_path / "model", 1, ExpertSize(3.0), "gpt-oss")
    with pytest.raises(UsageError, match="stay as they are"):
        synthetic.write_synthetic(tmp_path / "other", 1, ExpertSize(2.5), "gpt-oss")
