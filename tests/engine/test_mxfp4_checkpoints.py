"""gpt-oss as it is published, with experts in MXFP4: taken over, mended, or refused."""

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_prequantized import save_sharded
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from mixchat.base.errors import CheckpointError, UsageError
from mixchat.base.progress import NoProgress
from mixchat.base.safetensors import split_part
from mixchat.install.care.repair import repair, verify
from mixchat.install.make.quantize_options import QuantizeOptions, make_blueprint
from mixchat.install.source.checkpoint import DirectoryCheckpoint
from mixchat.install.source.checkpoint_index import expected_index
from mixchat.loading.calibrate import CalibrationText, calibrate_model
from mixchat.weights.format.blueprint import experts_file
from mixchat.weights.format.installed_model import InstalledModel
from mixchat.weights.format.manifest import Source
from mixchat.weights.matrix.quant_type import Linear

FILE = "model.safetensors"
STACK = "model.layers.1.mlp.experts."
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_local_experts": 3}
Install = Callable[..., Path]
Tensors = dict[str, torch.Tensor]


class Published(NamedTuple):
    """A checkpoint in MXFP4, and one in fp32 with the numbers that its codes stand for."""

    quantized: Path
    meant: Path


@pytest.fixture(scope="session")
def published(
    make_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Published:
    """A tiny gpt-oss whose codes and scales lie in different shards. Do not write into it."""
    checkpoint = make_checkpoint(model_type="gpt_oss", std=0.1, stored_as="mxfp4", **SHAPE)
    stored = load_file(checkpoint / FILE)
    meant = {
        name.removesuffix("_blocks"): tensor
        if not name.endswith("_blocks")
        else convert_moe_packed_tensors(tensor, stored[name.replace("_blocks", "_scales")])
        for name, tensor in stored.items()
        if not name.endswith("_scales")
    }
    made = Published(*(tmp_path_factory.mktemp("mxfp4") / name for name in Published._fields))
    for directory in made:
        shutil.copytree(checkpoint, directory)
    save_sharded(stored, made.quantized, 3)
    config = json.loads((made.meant / "config.json").read_text())
    del config["quantization_config"]
    (made.meant / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.float() for name, tensor in meant.items()}, made.meant / FILE)
    return made


@pytest.fixture
def changed(published: Published, tmp_path: Path) -> Callable[[Callable[[Tensors], object]], Path]:
    """Return a copy of the checkpoint whose tensors a function has changed."""

    def change(how: Callable[[Tensors], object]) -> Path:
        copy = shutil.copytree(published.quantized, tmp_path / "changed")
        tensors = {
            name: tensor
            for path in copy.glob("*.safetensors")
            for name, tensor in load_file(path).items()
        }
        for path in copy.glob("model*"):
            path.unlink()
        how(tensors)
        save_file(tensors, copy / FILE)
        return copy

    return change


def matrices(model: Path, layer: int, expert: int) -> list[torch.Tensor]:
    """Return w13 and w2 of an expert, and their biases, in fp32."""
    with InstalledModel(model) as installed:
        form = installed.blueprint.expert_of(layer)
        block = torch.empty(form.stride, dtype=torch.uint8)
        installed.read_expert(layer, expert, block)
        built = form.build(block)
    both: tuple[Linear, Linear] = (built.gate_up, built.down)
    found = []
    for linear, columns in zip(
        both, (SHAPE["hidden_size"], SHAPE["intermediate_size"]), strict=True
    ):
        bias = linear(torch.zeros(1, columns))
        found += [linear(torch.eye(columns)) - bias, bias]
    return found


def test_each_code_is_taken_over(published, install):
    model = install(published.quantized)
    with InstalledModel(model) as installed:
        made = installed.manifest.quantization
        assert (made["quant_type"], made["blocksize"], made["scales"]) == ("mxfp4", 32, "given")
    meant = load_file(published.meant / FILE)
    for expert in range(SHAPE["num_local_experts"]):
        up, up_bias, down, down_bias = matrices(model, 1, expert)
        weight, bias = (meant[f"{STACK}gate_up_proj{part}"][expert] for part in ("", "_bias"))
        gates_above_ups = torch.cat((weight[:, ::2], weight[:, 1::2]), dim=-1)
        # The products with ones and zeros are off by a rounding of the sum.
        torch.testing.assert_close(up, gates_above_ups, rtol=1e-5, atol=1e-6)
        assert torch.equal(up_bias[0], torch.cat((bias[::2], bias[1::2])))
        torch.testing.assert_close(down, meant[f"{STACK}down_proj"][expert], rtol=1e-5, atol=1e-6)
        assert torch.equal(down_bias[0], meant[f"{STACK}down_proj_bias"][expert])


def test_a_stack_is_read_as_the_numbers_that_its_codes_stand_for(published):
    checkpoint = DirectoryCheckpoint(published.quantized, Source("x"))
    stored = {
        name: tensor
        for path in published.quantized.glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }

    def read(name: str) -> torch.Tensor:
        whole, part = split_part(name)
        return stored[whole][part]

    for name in (f"{STACK}gate_up_proj", f"{STACK}down_proj"):
        found = checkpoint.index.read_dense(f"{name}[2]", read)
        assert torch.equal(found.float(), load_file(published.meant / FILE)[name][2])


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        (QuantizeOptions(), ("mxfp4", "int8", "int8")),
        (QuantizeOptions(attention=4, head=16), ("mxfp4", "nf4", "none")),
    ],
)
def test_nothing_but_experts_is_in_mxfp4(published, options, kinds):
    made = make_blueprint(DirectoryCheckpoint(published.quantized, Source("x")).index, options)
    stored = made.quantization
    assert (stored.quant_type, stored.attention, stored.head) == kinds


def test_its_tensors_are_foreseen_without_reading_it(published):
    index = DirectoryCheckpoint(published.quantized, Source("x")).index
    foreseen = expected_index(index.config, "x", mxfp4=True)
    found, expected = (
        {spec for shard in some.shards for spec in some.header(shard).specs}
        for some in (index, foreseen)
    )
    assert found == expected


@pytest.mark.parametrize("kind", ["trellis3", "none"])
def test_other_bits_of_experts_are_refused(published, kind):
    index = DirectoryCheckpoint(published.quantized, Source("x")).index
    with pytest.raises(UsageError, match=r"has the experts in 4 bits already \(mxfp4\)$"):
        make_blueprint(index, QuantizeOptions(kind))


def test_experts_cannot_be_calibrated(published, install):
    model = install(published.quantized)
    with pytest.raises(UsageError, match=r"stay as they are: .* has them in 4 bits \(mxfp4\)"):
        calibrate_model(model, CalibrationText(None, 1), NoProgress(), nullcontext(lambda *_: None))


def test_a_damaged_expert_is_mended_from_the_checkpoint(published, install):
    model = install(published.quantized)
    path = model / experts_file(1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20000] + bytes(9) + whole[-20000 + 9 :])
    assert path.read_bytes() != whole
    opened = DirectoryCheckpoint(published.quantized, Source("test"))
    repair(model, verify(model, NoProgress()), opened, NoProgress())
    assert path.read_bytes() == whole


def cut_short(tensors: Tensors) -> None:
    tensors[f"{STACK}down_proj_blocks"] = tensors[f"{STACK}down_proj_blocks"][:, :, 1:].clone()


def as_int8(tensors: Tensors) -> None:
    name = f"{STACK}gate_up_proj_scales"
    tensors[name] = tensors[name].to(torch.int8)


def with_a_norm(tensors: Tensors) -> None:
    tensors["model.norm.weight_blocks"] = tensors.pop("model.norm.weight").to(torch.uint8)
    tensors["model.norm.weight_scales"] = tensors["model.norm.weight_blocks"].clone()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(f"{STACK}down_proj_scales"), "down_proj_scales is missing"),
        (
            lambda t: t.update({f"{STACK}down_proj": torch.zeros(3, 96, 64)}),
            "down_proj_blocks' is not a tensor of a gpt_oss",
        ),
        (lambda t: t.pop(f"{STACK}down_proj_blocks"), "down_proj_blocks is missing"),
        (
            lambda t: t.update({f"{STACK}more_blocks": torch.zeros(1)}),
            "is not a tensor of a gpt_oss",
        ),
        (cut_short, r"down_proj_blocks has the shape \[3, 64, 2, 16\]"),
        (as_int8, "gate_up_proj_scales is torch.int8"),
        (with_a_norm, "norm.weight: in MXFP4, but no stack of matrices"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_its_headers(changed, change, said):
    with pytest.raises(CheckpointError, match=said):
        _ = DirectoryCheckpoint(changed(change), Source("x")).index


def test_a_scale_that_is_no_number_is_refused(changed, install):
    def change(tensors: Tensors) -> None:
        tensors[f"{STACK}down_proj_scales"][2, 5, 1] = 255

    with pytest.raises(CheckpointError, match=r"down_proj_scales\[2\]: holds NaN$"):
        install(changed(change))
