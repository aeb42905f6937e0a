"""Experts made anew from the checkpoint, for the inputs that they got."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from mixchat.base import files
from mixchat.base.errors import CheckpointError
from mixchat.base.model_config import ModelConfig
from mixchat.install.make.calibrator import Calibrator, ExpertInputs, InputsWriter, inputs_size
from mixchat.install.make.parts import ModelPart, model_parts
from mixchat.install.make.quantize_options import QuantizeOptions, make_blueprint
from mixchat.install.source.checkpoint import CheckpointReader, DirectoryCheckpoint
from mixchat.weights.families.read_config import read_config_file
from mixchat.weights.format.expert import swiglu_of
from mixchat.weights.format.manifest import Source
from mixchat.weights.matrix.linear import LinearSpec
from mixchat.weights.matrix.quant_type import Inputs

TOKENS, WINDOW = 200, 10


@pytest.fixture
def config(tiny_checkpoint: Path) -> ModelConfig:
    return read_config_file(tiny_checkpoint / "config.json")


@pytest.fixture
def inputs(tmp_path: Path, config: ModelConfig) -> ExpertInputs:
    """No token chooses expert 3."""
    generator = torch.Generator().manual_seed(0)
    with InputsWriter(tmp_path / "inputs") as writer:
        for layer in range(config.num_hidden_layers):
            rows = torch.randn(TOKENS, config.hidden_size, generator=generator)
            selected = torch.rand(TOKENS, 3, generator=generator).argsort(-1)[:, :2]
            for some, chosen in zip(rows.split(64), selected.split(64), strict=True):
                writer.add(layer, some, chosen)
    return ExpertInputs(tmp_path / "inputs", config)


@torch.inference_mode()
@pytest.mark.parametrize("model_type", ["mixtral", "granitemoe", "gpt_oss"])
def test_w2_learns_from_what_w13_gives_it_and_aims_at_what_the_checkpoint_gives(
    model_type, make_checkpoint, tmp_path, monkeypatch
):
    """w2 learnt from the products of a w13 that was not rounded, which it never gets."""
    std = 1.0 if model_type == "gpt_oss" else 0.2  # beyond its limits, too
    checkpoint = make_checkpoint(model_type=model_type, std=std)
    opened = DirectoryCheckpoint(checkpoint, Source("test"))
    config = opened.index.config
    with InputsWriter(tmp_path / "inputs") as writer:
        for layer in range(config.num_hidden_layers):
            writer.add(layer, torch.randn(50, config.hidden_size), torch.zeros(50, 2))
    learnt, encoded = dict[str, Inputs](), ModelPart.encoded

    def noting(part: ModelPart, weight: torch.Tensor, inputs: Inputs, *rest: Any) -> Any:
        assert part.linear is not None
        learnt[part.linear.name] = inputs
        return encoded(part, weight, inputs, *rest)

    monkeypatch.setattr(ModelPart, "encoded", noting)
    parts = model_parts(make_blueprint(opened.index, QuantizeOptions()))
    w13, w2 = (part for part in parts if part.expert == (1, 2))
    with CheckpointReader(opened) as reader:
        calibrator = Calibrator(ExpertInputs(tmp_path / "inputs", config), opened, reader, WINDOW)
        assert w13.linear is not None
        made = calibrator.make(w13)
        rounded = w13.linear.dequantized(made).float()
        calibrator.make(w2)
    layer = AutoModelForCausalLM.from_pretrained(checkpoint).model.layers[1]
    experts = (layer.mlp if hasattr(layer, "mlp") else layer.block_sparse_moe).experts
    swiglu, exact = swiglu_of(config), learnt["w2"].exact
    assert exact is not None
    for place in (0, 1):  # to fit, and held out
        x = learnt["w13"][place].float()
        if model_type == "gpt_oss":
            gate_up = x @ experts.gate_up_proj[2] + experts.gate_up_proj_bias[2]
            expected = experts._apply_gate(gate_up)
            assert expected.abs().max() > 7
        else:
            gate, up = (x @ experts.gate_up_proj[2].T).chunk(2, dim=-1)
            expected = functional.silu(gate) * up
        assert (exact[place] - expected).norm() < 0.01 * expected.norm()  # in bf16
        products = x @ rounded.T + (made[-1] if w13.linear.bias else 0)
        given = swiglu(products.bfloat16())
        assert (learnt["w2"][place] - given).norm() < 0.01 * given.norm()
        assert (learnt["w2"][place] - expected).norm() > 0.03 * expected.norm()


@pytest.mark.parametrize("expert", [0, 3])
def test_an_expert_learns_from_the_rows_that_chose_it_and_from_a_few_of_all(inputs, expert):
    every, chosen = inputs.of(1, expert)
    assert chosen.any() == (expert != 3)
    no_checkpoint = SimpleNamespace(index=None)
    learnt = Calibrator(inputs, no_checkpoint, None, WINDOW)._rows(1, expert)  # type: ignore[arg-type]
    windows, own = (x.view(-1, 5, WINDOW, *x.shape[1:]) for x in (every, chosen))
    for rows, place in zip(learnt, (slice(4), slice(4, 5)), strict=True):  # to fit, and held out
        there, chose = windows[:, place].flatten(0, 2), own[:, place].flatten(0, 2)
        few = there[:: len(there) // 32][:32]
        assert torch.equal(rows, torch.cat((there[chose], few)))


def test_the_rows_come_back_as_bf16_with_their_experts(tmp_path, config):
    """Expert 300 of 512 (Qwen3-Next) was stored as expert 44."""
    rows, selected = torch.randn(5, config.hidden_size), torch.tensor([[0, 44]] * 4 + [[300, 2]])
    with InputsWriter(tmp_path / "inputs") as writer:
        for layer in range(2):
            writer.add(layer, (layer + 1) * rows[:2], selected[:2])
            writer.add(layer, (layer + 1) * rows[2:], selected[2:])
    inputs = ExpertInputs(tmp_path / "inputs", config)
    for layer in (1, 0):
        every, chosen = inputs.of(layer, 300)
        assert torch.equal(every, ((layer + 1) * rows).bfloat16())
        assert chosen.tolist() == [False] * 4 + [True]
    on_disk = sum(path.stat().st_size for path in (tmp_path / "inputs").iterdir())
    assert on_disk == inputs_size(config, 5)


def test_what_was_cut_off_leaves_nothing(tmp_path, config):
    def cut_off() -> None:
        with InputsWriter(tmp_path / "inputs") as writer:
            writer.add(0, torch.zeros(1, config.hidden_size), torch.zeros(1, 2))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cut_off()
    assert not list(tmp_path.iterdir())


def test_inputs_may_be_larger_than_other_files_of_a_model(tmp_path, config, monkeypatch):
    """Those of a large model have hundreds of megabytes. They were refused after hours."""
    monkeypatch.setattr(files, "MAX_SIZE", 100)
    with InputsWriter(tmp_path / "inputs", dense_rows=10) as writer:
        writer.add(0, torch.ones(7, config.hidden_size), torch.zeros(7, 2))
        writer.add_dense("lm_head", torch.ones(12, 64))
    inputs = ExpertInputs(tmp_path / "inputs", config)
    linear = LinearSpec("lm_head", 8, 64, "int6", torch.bfloat16)
    assert len(inputs.of(0, 0)[0]) == 7
    assert inputs.dense(linear).shape == (10, 64)


def test_damaged_inputs_are_an_error(tmp_path, config):
    with InputsWriter(tmp_path / "inputs") as writer:
        writer.add(0, torch.zeros(3, config.hidden_size), torch.zeros(3, 2))
    path = tmp_path / "inputs" / "inputs-000"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="the inputs of layer 0 are damaged"):
        ExpertInputs(tmp_path / "inputs", config).of(0, 0)
