"""Checkpoints that bitsandbytes has quantized: taken over, and computed as it would."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file

from mixchat.base.errors import UsageError
from mixchat.install.make.quantize_options import QuantizeOptions, make_blueprint
from mixchat.install.source.checkpoint import DirectoryCheckpoint
from mixchat.weights.format.installed_model import InstalledModel
from mixchat.weights.format.manifest import Source
from mixchat.weights.matrix.linear import LinearSpec
from mixchat.weights.matrix.nf4 import NF4

# bitsandbytes dequantizes whole blocks a row rightly, and only those.
WHOLE_BLOCKS = {"intermediate_size": 128}
LINEAR = re.compile(r".*(_proj|experts\.\d+\.w\d|block_sparse_moe\.gate)\.weight")


def prequantize(
    checkpoint: Path, target: Path, *, shards: int = 1, **how: Any
) -> tuple[Path, Path]:
    """The checkpoint as bitsandbytes serializes it, and what it stands for in fp32."""
    tensors, stored, meant = load_file(checkpoint / "model.safetensors"), {}, {}
    for name, weight in tensors.items():
        if not LINEAR.fullmatch(name):
            stored[name] = weight.to(torch.bfloat16)
            meant[name] = stored[name].float()
            continue
        codes, state = bnb.quantize_4bit(weight.to(torch.bfloat16), blocksize=64, **how)
        stored[name] = codes
        stored |= {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
        meant[name] = bnb.dequantize_4bit(codes, state).float()
    for directory in (quantized := target / "quantized", reference := target / "reference"):
        shutil.copytree(checkpoint, directory)
    save_file(meant, reference / "model.safetensors")
    save_sharded(stored, quantized, shards)
    return quantized, reference


def save_sharded(tensors: dict[str, torch.Tensor], directory: Path, count: int) -> None:
    """Deal the tensors out, so that the parts of a matrix lie in different files."""
    (directory / "model.safetensors").unlink()
    files = [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
    weight_map = {name: files[n % count] for n, name in enumerate(sorted(tensors))}
    for file in files:
        part = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        save_file(part, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture
def in_nf4(make_checkpoint: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint whose matrices are all in NF4, and what it stands for in fp32."""
    return prequantize(make_checkpoint(**WHOLE_BLOCKS), tmp_path, quant_type="nf4")


def assert_stands_for(spec: LinearSpec, tensors: list[torch.Tensor], weight: torch.Tensor) -> None:
    """Compare a stored matrix with a dense one, within the rounding of scales to bf16."""
    torch.testing.assert_close(spec.dequantized(tensors).float(), weight, rtol=2**-6, atol=1e-6)


@pytest.mark.parametrize(
    ("how", "shards"),
    [
        ({}, 1),
        ({"compress_statistics": True}, 3),
        ({"quant_storage": torch.bfloat16}, 2),
    ],
    ids=["plain", "scales of scales", "stored as bf16"],
)
def test_no_code_is_changed(how, shards, make_checkpoint, install, tmp_path):
    """A second quantization would change few codes of weights that are exact, but some."""
    checkpoint = make_checkpoint(**WHOLE_BLOCKS)
    quantized, reference = prequantize(checkpoint, tmp_path, shards=shards, quant_type="nf4", **how)
    source = {
        name: tensor
        for path in quantized.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }
    meant = load_file(reference / "model.safetensors")
    with InstalledModel(install(quantized)) as installed:
        assert installed.manifest.quantization["quant_type"] == "nf4"
        assert installed.manifest.quantization["attention"] == "nf4"
        form = installed.blueprint.expert
        block = torch.empty(form.stride, dtype=torch.uint8)
        installed.read_expert(1, 2, block)
        prefix = "model.layers.1.block_sparse_moe.experts.2."
        for spec, found, names in zip(
            (form.gate_up, form.down), form._views(block), (("w1", "w3"), ("w2",)), strict=True
        ):
            stored = [source[f"{prefix}{name}.weight"].view(torch.uint8) for name in names]
            scales = torch.zeros(spec.rows * spec.columns // 64, dtype=torch.bfloat16)
            _, packed = NF4.pack(torch.cat(stored).flatten(), scales, spec.columns)
            assert torch.equal(found[1], packed)
            weight = torch.cat([meant[f"{prefix}{name}.weight"] for name in names])
            assert_stands_for(spec, found, weight)
        spec = installed.blueprint.mixer(0).matrices["o_proj"]
        found = [installed.tensor(tensor) for tensor in spec.tensors]
        assert_stands_for(spec, found, meant["model.layers.0.self_attn.o_proj.weight"])
        gate = installed.blueprint.router(0)["gate"]
        assert torch.equal(installed.tensor(gate), meant[gate.name].to(torch.bfloat16))


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
def test_fp4_becomes_what_a_checkpoint_in_16_bits_becomes(
    storage, make_checkpoint, install, tmp_path
):
    """It is read as 16 bits, so its experts get NF4 or any other type."""
    how: dict[str, Any] = {"compress_statistics": True, "quant_storage": storage}
    quantized, reference = prequantize(
        make_checkpoint(**WHOLE_BLOCKS), tmp_path, quant_type="fp4", **how
    )
    file = reference / "model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, file)
    for options in ({}, {"quant_type": "trellis3", "attention": 6}):
        models = [install(checkpoint, **options) for checkpoint in (quantized, reference)]
        for name in ("shared.safetensors", "experts-000.safetensors", "experts-001.safetensors"):
            assert len({(model / name).read_bytes() for model in models}) == 1


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_matrix_whose_blocks_do_not_end_with_rows_is_dequantized(
    kind, make_checkpoint, install, tmp_path
):
    checkpoint = make_checkpoint(intermediate_size=96)
    quantized, _ = prequantize(checkpoint, tmp_path, quant_type=kind)
    weight = load_file(checkpoint / "model.safetensors")[
        "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    ]
    # bitsandbytes reads one long row rightly.
    flat = weight.to(torch.bfloat16).view(1, -1)
    codes, state = bnb.quantize_4bit(flat, blocksize=64, quant_type=kind)
    expected = bnb.dequantize_4bit(codes, state).view(weight.shape)
    with InstalledModel(install(quantized)) as installed:
        form = installed.blueprint.expert
        block = torch.empty(form.stride, dtype=torch.uint8)
        installed.read_expert(1, 2, block)
    assert (form.gate_up.quant_type, form.down.quant_type) == ("nf4", "none")
    assert torch.equal(form._views(block)[1][0], expected)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (QuantizeOptions("trellis3"), "the experts in 4 bits already"),
        (QuantizeOptions("none"), "the experts in 4 bits already"),
        (QuantizeOptions(attention=8), "the attention in 4 bits already"),
    ],
)
def test_other_bits_than_it_has_are_refused(in_nf4, options, said):
    """`download DIRECTORY --expert-bits 3` said nothing and installed 4 bits."""
    index = DirectoryCheckpoint(in_nf4[0], Source("x")).index
    with pytest.raises(UsageError, match=said):
        make_blueprint(index, options)
    assert make_blueprint(index, QuantizeOptions(attention=4)).quantization.attention == "nf4"


def test_attention_alone_in_4_bits_is_dequantized_unless_the_experts_are_so_too(in_nf4, install):
    quantized, reference = in_nf4
    (shard,) = quantized.glob("*.safetensors")
    stored, meant = load_file(shard), load_file(reference / "model.safetensors")
    moe = ".block_sparse_moe."
    tensors = {name: tensor for name, tensor in stored.items() if moe not in name}
    tensors |= {name: tensor.to(torch.bfloat16) for name, tensor in meant.items() if moe in name}
    for path in quantized.glob("model*"):
        path.unlink()
    save_file(tensors, quantized / "model.safetensors")
    with InstalledModel(install(quantized, attention=16)) as installed:
        assert installed.manifest.quantization["attention"] == "none"
        o = installed.tensor(installed.blueprint.mixer(0).matrices["o_proj"].tensors[0])
        expected = meant["model.layers.0.self_attn.o_proj.weight"].to(torch.bfloat16)
        assert torch.equal(o, expected)
