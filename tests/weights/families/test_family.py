"""The slices of a checkpoint's tensors that families have in common."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixchat.base.model_config import ModelConfig
from mixchat.base.rope_parameters import RopeParameters
from mixchat.base.safetensors import SafetensorsFile, tensor_sha256
from mixchat.install.make.parts import model_parts
from mixchat.install.make.quantize_options import QuantizeOptions, make_blueprint
from mixchat.install.source.checkpoint_index import CheckpointIndex
from mixchat.weights.families.family import Slice, attention
from mixchat.weights.families.read_config import read_config_file

HEADS, GROUPS, WIDTH, HIDDEN = 3, 1, 4, 6
CONFIG = ModelConfig(
    "any", 10, HIDDEN, 8, 2, HEADS, GROUPS, WIDTH, 2, 1, 32, 1e-5, RopeParameters(1e4)
)


def made_parts(checkpoint: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the names of a model's parts, with the SHA-256 of their tensors."""
    with SafetensorsFile(checkpoint / "model.safetensors") as file:
        config = read_config_file(checkpoint / "config.json")
        index = CheckpointIndex(config, {"model.safetensors": file.header}, None, "here")
        for part in model_parts(make_blueprint(index, QuantizeOptions("none"))):
            yield part.name, [*map(tensor_sha256, part.make(index, file.read))]


def joined(slices: tuple[Slice, ...], tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    pieces = []
    for source in slices:
        tensor = tensors[source.name]
        assert tensor.shape == source.shape
        pieces.append(tensor if source.rows is None else tensor[[*source.rows]])
    return torch.cat(pieces)


@pytest.mark.parametrize("neighbours", [False, True])
def test_gates_that_follow_each_query_lie_below_the_values(neighbours):
    config = replace(CONFIG, attn_output_gate=True, qkv_bias=True)
    described = dict(attention(rotates_neighbours=neighbours)(config, 1))
    own = "model.layers.1.self_attn."
    counts = {"q": 2 * HEADS, "k": GROUPS, "v": GROUPS}
    for parameter, shape in (("weight", (HIDDEN,)), ("bias", ())):
        stored = {
            f"{own}{x}_proj.{parameter}": torch.randn(count * WIDTH, *shape)
            for x, count in counts.items()
        }
        q, k, v = stored.values()
        heads = q.view(HEADS, 2, WIDTH, *shape)
        queries, keys = heads[:, 0], k.view(GROUPS, WIDTH, *shape)
        if neighbours:
            queries, keys = (
                torch.cat((part[:, ::2], part[:, 1::2]), 1) for part in (queries, keys)
            )
        expected = [part.flatten(0, 1) for part in (queries, keys)]
        result = joined(described[f"{own}qkv_proj.{parameter}"], stored)
        assert torch.equal(result, torch.cat([*expected, v, heads[:, 1].flatten(0, 1)]))


def test_a_factor_of_scores_is_one_of_the_norm_if_queries_have_one():
    """Of the matrix it would have no effect, because the norm divides by the size."""
    scaled = replace(CONFIG, attention_multiplier=1.0)
    for config, name in (
        (scaled, "qkv_proj"),
        (replace(scaled, qk_norm="head"), "q_norm"),
    ):
        factors = {
            installed: source.factor
            for installed, slices in attention()(config, 0)
            for source in slices
            if source.factor != 1
        }
        assert factors == {f"model.layers.0.self_attn.{name}.weight": 2.0}


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_a_checkpoint_with_stacked_experts_or_with_more_than_text_makes_the_same_model(
    make_checkpoint, tmp_path, stacked, nested
):
    """Qwen3.6 is published in 16 bits with stacks beside a vision model, and in FP8 without stacks.

    transformers loads both.
    """
    plain = make_checkpoint(model_type="qwen3_5_moe", num_local_experts=3)
    tensors = dict(load_file(plain / "model.safetensors"))
    config = json.loads((plain / "config.json").read_text())
    if stacked:
        for layer in range(config["num_hidden_layers"]):
            own = f"model.layers.{layer}.mlp.experts."
            parts = [
                {x: tensors.pop(f"{own}{n}.{x}_proj.weight") for x in ("gate", "up", "down")}
                for n in range(3)
            ]
            gate_up = [torch.cat((part["gate"], part["up"])) for part in parts]
            tensors[f"{own}gate_up_proj"] = torch.stack(gate_up)
            tensors[f"{own}down_proj"] = torch.stack([part["down"] for part in parts])
    if nested:
        names = {name: name.replace("model.", "model.language_model.") for name in tensors}
        tensors = {names[name]: tensor for name, tensor in tensors.items()}
        left_out = ("model.visual.blocks.0.norm1.weight", "mtp.fc.weight")
        tensors |= {name: torch.ones(5) for name in left_out}
        config = {"model_type": "qwen3_5_moe", "text_config": config, "vision_config": {"depth": 1}}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    made = [[*made_parts(directory)] for directory in (plain, tmp_path)]
    assert made[0] == made[1]
