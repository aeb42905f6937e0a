"""Experts made anew from the checkpoint, for the inputs that they got."""

from collections.abc import Callable
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
from mixchat.weights.format.blueprint import Blueprint
from mixchat.weights.format.expert import swiglu_of
from mixchat.weights.format.manifest import Source
from mixchat.weights.matrix.linear import LinearSpec
from mixchat.weights.matrix.quant_type import Inputs

TOKENS, WINDOW = 200, 10


@pytest.fixture(scope="module")
def wide_checkpoint(make_checkpoint: Callable[..., Path]) -> Path:
    """Several blocks in each row, so that their scales can differ."""
    return make_checkpoint(hidden_size=128, intermediate_size=192, num_hidden_layers=2)


@pytest.fixture
def config(wide_checkpoint: Path) -> ModelConfig:
    return read_config_file(wide_checkpoint / "config.json")


@pytest.fixture
def inputs(tmp_path: Path, config: ModelConfig) -> ExpertInputs:
    """Few columns matter, others in each layer; no token chooses expert 3."""
    generator = torch.Generator().manual_seed(0)
    with InputsWriter(tmp_path / "inputs") as writer:
        for layer in range(config.num_hidden_layers):
            rows = 0.05 * torch.randn(TOKENS, config.hidden_size, generator=generator)
            rows[:, layer::7] *= 40
            selected = torch.rand(TOKENS, 3, generator=generator).argsort(-1)[:, :2]
            for some, chosen in zip(rows.split(64), selected.split(64), strict=True):
                writer.add(layer, some, chosen)
    return ExpertInputs(tmp_path / "inputs", config)


def made(
    checkpoint: Path, blueprint: Blueprint, inputs: ExpertInputs | None
) -> dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]]:
    """Each expert's dequantized w13 and w2, calibrated or plain."""
    opened = DirectoryCheckpoint(checkpoint, Source("test"))
    found: dict[tuple[int, int], list[torch.Tensor]] = {}
    with CheckpointReader(opened) as reader:
        make = lambda part: part.make(opened.index, reader.read)  # noqa: E731
        if inputs is not None:
            make = Calibrator(inputs, opened, reader, WINDOW).make
        for part in model_parts(blueprint):
            if part.expert is None:
                continue
            tensors = make(part)
            found.setdefault(part.expert, []).append(matrix(part, tensors))
    return {key: (w13, w2) for key, (w13, w2) in found.items()}


def matrix(part: ModelPart, tensors: list[torch.Tensor]) -> torch.Tensor:
    assert part.linear is not None
    linear = part.linear.build(tensors[: len(part.linear.tensors)])
    return linear(torch.eye(part.linear.columns)).T


def error(weight: torch.Tensor, exact: torch.Tensor, rows: torch.Tensor) -> float:
    return float(((weight - exact) @ rows.T).norm() / (exact @ rows.T).norm())


def test_products_with_an_experts_own_inputs_get_better(wide_checkpoint, config, inputs):
    opened = DirectoryCheckpoint(wide_checkpoint, Source("test"))
    options = QuantizeOptions()
    blueprint = make_blueprint(opened.index, options)
    dense = make_blueprint(opened.index, QuantizeOptions("none"))
    exact, plain, calibrated = (
        made(wide_checkpoint, form, given)
        for form, given in ((dense, None), (blueprint, None), (blueprint, inputs))
    )
    totals = torch.zeros(2, 2)  # of w13 and w2, plain and calibrated
    for key in exact:
        every, chosen = inputs.of(*key)
        rows = (every[chosen] if chosen.any() else every).float()
        gate, up = (rows @ exact[key][0].T).chunk(2, dim=-1)
        for which, given in enumerate((rows, functional.silu(gate) * up)):
            for number, one in enumerate((plain, calibrated)):
                totals[which, number] += error(one[key][which], exact[key][which], given)
    before, after = totals.T
    assert after[0] < 0.9 * before[0]
    assert after[1] < before[1]  # whose columns matter alike in a random model


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


def test_an_expert_that_no_token_chose_learns_from_a_few_of_all(inputs):
    every, chosen = inputs.of(1, 3)
    assert not chosen.any()
    no_checkpoint = SimpleNamespace(index=None)
    fit, held_out = Calibrator(inputs, no_checkpoint, None, WINDOW)._rows(1, 3)  # type: ignore[arg-type]
    windows = every.view(-1, 5, WINDOW, every.shape[-1])
    assert torch.equal(fit, windows[:, :4].flatten(0, 2)[::5][:32])
    assert torch.equal(held_out, windows[:, 4].flatten(0, 1)[:32])


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
