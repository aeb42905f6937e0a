"""Checkpoints in FP8 with tiles: installed, they are the floats that their tiles stand for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from weight_tools import files_of, quantize

from mixchat.base.errors import CheckpointError
from mixchat.weights.families.read_config import read_config_file

CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}


def split(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix as FP8 and its scales, tile by tile."""
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    rows, columns = (-(-length // 128) for length in weight.shape)
    scales = torch.empty(rows, columns)
    for row in range(rows):
        for column in range(columns):
            place = slice(row * 128, row * 128 + 128), slice(column * 128, column * 128 + 128)
            scales[row, column] = weight[place].abs().max() / 448
            codes[place] = (weight[place] / scales[row, column]).to(torch.float8_e4m3fn)
    return codes, scales


def whole(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    large = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
    return (codes.float() * large[: codes.shape[0], : codes.shape[1]]).to(torch.bfloat16)


@pytest.fixture
def checkpoints(make_checkpoint: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """A Qwen3 in FP8, but for router, norms, embedding and head, and the same as floats."""
    changes = {"hidden_size": 160, "moe_intermediate_size": 288, "num_hidden_layers": 1}
    plain = make_checkpoint(model_type="qwen3_moe", stored_as="bfloat16", **changes)
    in_fp8, as_floats = tmp_path / "fp8", tmp_path / "floats"
    tensors: dict[str, torch.Tensor] = {}
    floats: dict[str, torch.Tensor] = {}
    for name, weight in load_file(plain / "model.safetensors").items():
        if "_proj" in name:
            tensors[name], tensors[f"{name}_scale_inv"] = split(weight.float())
            floats[name] = whole(tensors[name], tensors[f"{name}_scale_inv"])
        else:
            tensors[name] = floats[name] = weight
    for directory, stored in ((in_fp8, tensors), (as_floats, floats)):
        shutil.copytree(plain, directory)
        save_file(stored, directory / "model.safetensors")
    config = json.loads((plain / "config.json").read_text())
    (in_fp8 / "config.json").write_text(json.dumps({**config, "quantization_config": CONFIG}))
    return in_fp8, as_floats


def test_it_is_installed_as_its_floats(checkpoints, tmp_path):
    made = []
    for number, checkpoint in enumerate(checkpoints):
        quantize(checkpoint, tmp_path / str(number))
        files = files_of(tmp_path / str(number))
        made.append([data for name, data in files.items() if name.endswith("tensors")])
    assert made[0] == made[1]


@pytest.mark.parametrize("change", ["shape", "type", "missing"])
def test_scales_that_do_not_fit_are_refused(checkpoints, tmp_path, change):
    path = checkpoints[0] / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.0.mlp.experts.1.up_proj.weight_scale_inv"
    scales = tensors.pop(name)
    if change != "missing":
        tensors[name] = scales[1:].clone() if change == "shape" else scales.to(torch.int32)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="up_proj"):
        quantize(checkpoints[0], tmp_path / "model")


@pytest.mark.parametrize("method", ["awq", "gptq", "compressed-tensors", "fp8", 5])
def test_other_forms_are_refused_by_name(tiny_checkpoint, tmp_path, method):
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"quantized with {method!r}") as caught:
        read_config_file(tmp_path / "config.json")
    assert "GGUF" in str(caught.value.hint)
