"""Models whose layers have states: texts that part, and long ones beside transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_tools import FAMILIES, RECURRENT, answer

from mixchat.base.options import LoadOptions
from mixchat.engine.caches.state_cache import StateCache
from mixchat.engine.generate import Engine
from mixchat.kernels.cpu.compile import kernels_available
from mixchat.loading.loader import load_engine

TOKENS = 300

each_kind = pytest.mark.parametrize("kind", RECURRENT)


def ids_of(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 97, (count,), generator=generator).tolist()


@pytest.fixture
def load(model_of: Callable[..., Path]) -> Callable[..., Engine]:
    def load(kind: str, **options: Any) -> Engine:
        changes = {"std": 0.1, "intermediate_size": 128, "max_position_embeddings": 1024}
        directory = model_of({**changes, **FAMILIES[kind]}, {})
        return load_engine(directory, LoadOptions(device="cpu", exact_prompts=True, **options))

    return load


def states(engine: Engine) -> list[torch.Tensor]:
    layers = [layer for layer in engine.held()[1].layers if isinstance(layer, StateCache)]
    assert layers
    return [tensor for layer in layers for tensor in layer.state.values()]


@pytest.mark.skipif(not kernels_available(), reason="the kernels need AVX2 or NEON")
@each_kind
def test_a_text_that_parts_from_the_one_before_has_the_bits_of_a_new_one(kind, load):
    engine, other = load(kind), load(kind)
    first = ids_of(TOKENS)
    answer(engine, first)
    for kept in (TOKENS, 220, 130, 2):
        text = [*first[:kept], *ids_of(41, seed=kept)]
        other.forget()
        assert answer(engine, text) == answer(other, text)
        assert all(map(torch.equal, *(states(each) for each in (engine, other))))


@each_kind
@torch.inference_mode()
def test_logits_of_a_longer_text_are_those_of_transformers(kind, make_checkpoint, install):
    from transformers import AutoModelForCausalLM

    changes = {"max_position_embeddings": 1024, "num_key_value_heads": 2, "seed": 1}
    checkpoint = make_checkpoint(**{**FAMILIES[kind], **changes})
    engine = load_engine(install(checkpoint, quant_type="none"), LoadOptions(device="cpu"))
    oracle = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    ids, cache = torch.tensor(ids_of(TOKENS)), engine.held()[1]
    expected = oracle(ids[None]).logits[0]
    for size in (TOKENS, 128, 7):
        cache.cut(0)
        parts = [
            engine.passes.model.forward(part, cache, logits_of=slice(None))
            for part in ids.split(size)
        ]
        assert (torch.cat(parts) - expected).abs().max() < 2e-4 * expected.abs().max()
