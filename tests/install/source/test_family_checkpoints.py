"""Checkpoints of every family: what is refused, and that installed weights are transformers'."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from care_tools import flip, verify
from fake_hub import COMMIT, REPO
from safetensors.torch import load_file, save_file
from weight_tools import files_of, quantize, shard

from mixchat.base.errors import CheckpointError
from mixchat.base.progress import NoProgress
from mixchat.base.safetensors import Header, SafetensorsFile, TensorSpec
from mixchat.install.care.repair import repair
from mixchat.install.make.quantize_options import QuantizeOptions
from mixchat.install.make.unfinished import Spill
from mixchat.install.source.checkpoint_index import CheckpointIndex
from mixchat.install.source.open_checkpoint import open_checkpoint
from mixchat.weights.families.read_config import FAMILIES, read_config_file
from mixchat.weights.format.installed_model import InstalledModel
from mixchat.weights.format.manifest import Source

STACKED = "granitemoe", "gpt_oss"
LAYER, EXPERT = 1, 2
# What these families cannot have beside three experts and biases.
CHANGES = {
    "deepseek_v2": {"attention_bias": False},
    "deepseek_v3": {"n_group": 1, "topk_group": 1},
    "laguna": {"attention_bias": False},
}


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, make_checkpoint: Callable[..., Path]) -> Path:
    changes = {"num_local_experts": 3, "attention_bias": True, **CHANGES.get(request.param, {})}
    return make_checkpoint(model_type=request.param, **changes)


def specs_of(checkpoint: Path) -> list[TensorSpec]:
    with SafetensorsFile(checkpoint / "model.safetensors") as file:
        return file.header.specs


def index_of(checkpoint: Path, specs: Sequence[TensorSpec]) -> CheckpointIndex:
    """Open a checkpoint as if it had these tensors."""
    config = read_config_file(checkpoint / "config.json")
    return CheckpointIndex(config, {"shard": Header.of(specs, "shard")}, None, "here")


def test_every_tensor_is_needed(checkpoint):
    specs = specs_of(checkpoint)
    index_of(checkpoint, specs)
    for missing in specs:
        others = [spec for spec in specs if spec is not missing]
        with pytest.raises(CheckpointError, match=f"{re.escape(missing.name)} is missing"):
            index_of(checkpoint, others)


def test_every_shape_is_checked(checkpoint):
    specs = specs_of(checkpoint)
    for number, spec in enumerate(specs):
        for place in range(len(spec.shape)):
            shape = tuple(size + (axis == place) for axis, size in enumerate(spec.shape))
            edited = [*specs[:number], replace(spec, shape=shape), *specs[number + 1 :]]
            with pytest.raises(CheckpointError, match=f"{re.escape(spec.name)} has the shape"):
                index_of(checkpoint, edited)


def test_the_codes_of_a_quantized_matrix_are_counted(make_checkpoint):
    """Only building the model compared them with the config, after all had been described."""
    specs = specs_of(checkpoint := make_checkpoint())
    name = "model.layers.0.self_attn.o_proj.weight"
    components = {"absmax": 64, "quant_map": 16, "quant_state.bitsandbytes__nf4": 9}
    others = [spec for spec in specs if spec.name != name]
    others += [TensorSpec(f"{name}.{x}", torch.uint8, (n,)) for x, n in components.items()]
    index_of(checkpoint, [*others, TensorSpec(name, torch.uint8, (64 * 64 // 2, 1))])
    with pytest.raises(CheckpointError, match=f"{name} has 1024 bytes of codes, .* asks for 2048"):
        index_of(checkpoint, [*others, TensorSpec(name, torch.uint8, (1024, 1))])


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.9.input_layernorm.weight",
        "model.layers.0.block_sparse_moe.experts.3.w1.weight",
        "model.layers.0.mlp.gate.e_score_correction_bias",
        "model.layers.0.mlp.experts.gate_up_proj[0]",
    ],
)
def test_another_tensor_is_refused(checkpoint, name):
    extra = TensorSpec(name, torch.float32, (3,))
    with pytest.raises(CheckpointError, match=f"'{re.escape(name)}' is not a tensor of a"):
        index_of(checkpoint, [*specs_of(checkpoint), extra])


def test_heads_that_predict_more_tokens_are_left_out(make_checkpoint, tmp_path):
    plain = make_checkpoint(model_type="mellum")
    quantize(plain, tmp_path / "plain")
    path = plain / "model.safetensors"
    save_file({**load_file(path), "mtp.0.layers.0.norm.weight": torch.ones(64)}, path)
    quantize(plain, tmp_path / "with")
    assert files_of(tmp_path / "with") == files_of(tmp_path / "plain")


@pytest.mark.parametrize("layers", [0, 1])
def test_layers_that_predict_more_tokens_are_left_out_if_the_config_has_them(
    make_checkpoint, layers
):
    checkpoint = make_checkpoint(model_type="glm4_moe", num_nextn_predict_layers=layers)
    extra = TensorSpec("model.layers.3.eh_proj.weight", torch.float32, (3,))
    specs = [*specs_of(checkpoint), extra]
    if layers:
        index_of(checkpoint, specs)
    else:
        with pytest.raises(
            CheckpointError, match=r"eh_proj\.weight' is not a tensor of a glm4_moe"
        ):
            index_of(checkpoint, specs)


def experts_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The matrices of an expert as transformers reads them, gate above up, [out, in]."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    layer, config = model.model.layers[LAYER], model.config
    names = ("mlp", "feed_forward", "block_sparse_moe")
    places = (layer, *(getattr(layer, name, None) for name in names))
    experts = next(place.experts for place in places if hasattr(place, "experts"))
    up, down = experts.gate_up_proj[EXPERT], experts.down_proj[EXPERT]
    if config.model_type != "gpt_oss":
        return {"w13.weight": up, "w2.weight": down * getattr(config, "residual_multiplier", 1)}
    apart = torch.cat((torch.arange(0, len(up.T), 2), torch.arange(1, len(up.T), 2)))
    return {
        "w13.weight": up.T[apart],
        "w13.bias": experts.gate_up_proj_bias[EXPERT][apart],
        "w2.weight": down.T,
        "w2.bias": experts.down_proj_bias[EXPERT],
    }


def installed_expert(checkpoint: Path, directory: Path, **options: Any) -> dict[str, torch.Tensor]:
    """Install the checkpoint, and return the tensors in the block of the same expert."""
    quantize(checkpoint, directory, QuantizeOptions(**options))
    with InstalledModel(directory) as installed:
        form = installed.blueprint.expert
        block = torch.empty(form.stride, dtype=torch.uint8)
        installed.read_expert(LAYER - installed.config.first_k_dense_replace, EXPERT, block)
    specs = [*form.gate_up.tensors, *form.down.tensors]
    views = block[: form.nbytes].split([spec.nbytes for spec in specs])
    return {
        spec.name: view.view(spec.dtype).view(spec.shape)
        for spec, view in zip(specs, views, strict=True)
    }


@torch.inference_mode()
def test_an_installed_expert_is_that_of_transformers(checkpoint, tmp_path):
    found = installed_expert(checkpoint, tmp_path / "model", quant_type="none")
    expected = experts_of(checkpoint)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_a_model_is_the_same_out_of_shards_that_part_its_matrices(
    checkpoint, tmp_path, monkeypatch
):
    write, spilled = Spill.write, list[str]()

    def noting(spill: Spill, name: str, file: Any, names: list[str]) -> Any:
        spilled.extend(names)
        return write(spill, name, file, names)

    monkeypatch.setattr(Spill, "write", noting)
    quantize(checkpoint, tmp_path / "whole")
    quantize(shard(checkpoint, tmp_path / "shards", 3), tmp_path / "model")
    assert files_of(tmp_path / "model") == files_of(tmp_path / "whole")
    kind = json.loads((checkpoint / "config.json").read_text())["model_type"]
    assert any("[" in name for name in spilled) == (kind == "gpt_oss")  # its biases are apart


@pytest.mark.parametrize("model_type", STACKED)
def test_repair_asks_for_the_bytes_of_one_expert_of_a_stack(
    model_type, make_checkpoint, make_hub, tmp_path
):
    checkpoint = make_checkpoint(model_type=model_type)
    fake, installed = make_hub(checkpoint), tmp_path / "installed"
    with open_checkpoint(Source(REPO), installed, NoProgress()) as opened:
        assert opened.source.commit == COMMIT
    quantize(checkpoint, installed)
    before = files_of(installed)
    damaged = installed / "experts-001.safetensors"
    with SafetensorsFile(damaged) as file:
        flip(damaged, file.header.start("3.w2.codes"))
    damages = verify(installed)
    fake.requests.clear()
    with open_checkpoint(Source(REPO, COMMIT), installed, NoProgress()) as opened:
        repair(installed, damages, opened, NoProgress())
        index = opened.index
    assert files_of(installed) == before
    down = {
        "granitemoe": "block_sparse_moe.output_linear.weight",
        "gpt_oss": "mlp.experts.down_proj",
    }
    name = f"model.layers.1.{down[model_type]}[3]"
    start = index.header("model.safetensors").start(name)
    ranges = {request.range for request in fake.requests if request.where == "store"}
    assert f"bytes={start}-{start + index.nbytes([name]) - 1}" in ranges
