"""Models of few bits against transformers, whatever the size of the cache of experts."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from engine_tools import FAMILIES, WAYS, logits
from safetensors.torch import load_file, save_file

from mixchat.base.options import LoadOptions
from mixchat.base.quantities import MemoryBudget
from mixchat.loading.loader import load_engine
from mixchat.weights.format.installed_model import InstalledModel
from mixchat.weights.matrix.nf4 import NF4, Quantized4bit

CPU = LoadOptions(device="cpu")
TOKENS = 40


def oracle(checkpoint: Path, dtype: torch.dtype = torch.float32) -> Any:
    from transformers import MixtralForCausalLM

    model = MixtralForCausalLM.from_pretrained(
        checkpoint, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    )
    return model.eval()


def prompt(vocab_size: int) -> torch.Tensor:
    return torch.randint(0, vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(7))


@torch.inference_mode()
@pytest.mark.parametrize("chunk", [1, 7])
@pytest.mark.parametrize("kind", ["some dense experts", "correction and dense layer"])
def test_the_inputs_of_dense_parts_are_recorded_for_each_token(kind, chunk, model_of):
    """By the recorded rows, the matrices give what the model computes."""
    engine: Any = load_engine(model_of(FAMILIES.get(kind, {"intermediate_size": 96}), {}), CPU)
    model, used = engine.passes.model, engine.blueprint
    ids = prompt(model.config.vocab_size)
    expected = logits(engine, ids, chunk)
    recorded: dict[str, list[torch.Tensor]] = {}
    model.record_inputs(lambda name, rows: recorded.setdefault(name, []).append(rows.clone()))
    assert torch.equal(logits(engine, ids, chunk), expected)
    rows = {name: torch.cat(some) for name, some in recorded.items()}
    assert rows.keys() == used.shared_matrices.keys()
    for name, spec in used.shared_matrices.items():
        assert rows[name].shape == (TOKENS, spec.columns)
    assert torch.equal(model.output.head(rows["lm_head"]), expected)
    norm = model.blocks[0].operations[0].norm
    normed = norm(model._embedding(ids))
    assert torch.equal(rows[used.mixer(0).matrices["qkv_proj"].name], normed)


def by_bitsandbytes(weight: torch.Tensor, name: str) -> torch.Tensor:
    """An expert's matrix taken to NF4 and back by bitsandbytes itself."""
    # As one row: on AVX512 it reads wrong scales where a row ends within a block.
    codes, state = bnb.quantize_4bit(weight.view(1, -1), blocksize=64, quant_type="nf4")
    return bnb.dequantize_4bit(codes, state).view(weight.shape)


def in_4_bits(weight: torch.Tensor, name: str) -> torch.Tensor:
    """An expert's matrix taken to NF4 and back; searched scales are tested by the definition."""
    return Quantized4bit(NF4, *weight.shape, *NF4.codes(weight, search=True)).dense(torch.float32)


TAKEN = {
    ("nf4", "absmax"): by_bitsandbytes,
    ("nf4", "search"): in_4_bits,
}


def dequantize_experts(
    checkpoint: Path, target: Path, take: Callable[[torch.Tensor, str], torch.Tensor]
) -> Path:
    """The checkpoint with each expert matrix taken to few bits and back."""
    shutil.copytree(checkpoint, target)
    tensors = load_file(target / "model.safetensors")
    for name, weight in tensors.items():
        if ".experts." in name:
            tensors[name] = take(weight.to(torch.bfloat16), name).float()
        else:
            tensors[name] = weight.to(torch.bfloat16).float()
    save_file(tensors, target / "model.safetensors")
    return target


def assert_as_near(
    ours: torch.Tensor, exact: torch.Tensor, rounded: torch.Tensor, times: float = 1.5
) -> None:
    """Each token's logits [T, V] are at most so many times as far from the exact ones as the
    rounded ones are.

    But for two: where two experts are all but equally good for it, rounding may choose the other.
    """
    noise = (rounded - exact).norm(dim=-1).median()
    distances = (ours - exact).norm(dim=-1)
    assert 0 < distances.median() < times * noise
    assert (distances > 2 * times * noise).sum() <= 2


def test_a_checkpoint_in_fp16_that_is_not_quantized_loses_nothing(make_checkpoint, install):
    """It became bf16: logits were nine times as far off as transformers' own in fp16."""
    checkpoint = make_checkpoint(std=0.05, stored_as="float16")
    ids = prompt(97)
    with torch.inference_mode():
        exact = oracle(checkpoint)(ids[None]).logits[0]
        rounded = oracle(checkpoint, torch.float16)(ids[None]).logits[0].float()
    engine = load_engine(install(checkpoint, quant_type="none"), CPU)
    assert engine.passes.model.output.norm.weight.dtype == torch.float16
    assert_as_near(logits(engine, ids, TOKENS).float(), exact, rounded)
    assert (rounded - exact).norm() < 0.003 * exact.norm()


@pytest.mark.parametrize(("kind", "scales"), TAKEN)
def test_few_bits_equal_a_dequantized_reference_to_bf16_rounding(
    kind, scales, make_checkpoint, install, tmp_path
):
    """bf16 rounding is what transformers itself loses when it runs the reference in bf16.

    The spread of the weights is so small that rounding hardly ever flips the router's choice.
    """
    checkpoint = make_checkpoint(std=0.03)
    reference = dequantize_experts(checkpoint, tmp_path / "reference", TAKEN[kind, scales])
    ids = prompt(97)
    with torch.inference_mode():
        exact = oracle(reference)(ids[None]).logits[0]
        rounded = oracle(reference, torch.bfloat16)(ids[None]).logits[0].float()
    how = {"quant_type": kind, "scales": scales, "attention": 16, "head": 16}
    engine = load_engine(install(checkpoint, **how), CPU)
    ours = logits(engine, ids, TOKENS).float()
    assert_as_near(ours, exact, rounded)
    assert (rounded - exact).norm() < 0.03 * exact.norm()  # or the comparison would say nothing


@pytest.mark.parametrize("kind", ["some dense experts", *WAYS])
def test_the_answer_is_the_same_for_every_size_of_the_cache(kind, model_of):
    shape = FAMILIES.get(kind, {"intermediate_size": 96})
    installed = model_of(shape, {})
    with InstalledModel(installed) as model:
        config, size = model.config, model.blueprint.expert.stride
    every = [
        logits(
            load_engine(installed, LoadOptions(MemoryBudget(size=slots * size), device="cpu")),
            prompt(97),
            8,
        )
        for slots in (2, 3, config.num_moe_layers * config.num_local_experts)
    ]
    assert all(torch.equal(every[0], other) for other in every[1:])
