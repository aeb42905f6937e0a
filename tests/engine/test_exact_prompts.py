"""`--exact-prompts`: a token read in a prompt gets the very bits that it gets when decoded."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_tools import WAYS, answer, cache_content, ids_of

from mixchat.base.errors import CheckpointError
from mixchat.base.options import LoadOptions, SamplingOptions
from mixchat.engine.chunk_sizer import PREFILL_CHUNK
from mixchat.engine.generate import Engine
from mixchat.engine.passes import SequenceTokens
from mixchat.engine.prompt_cache import PromptCache
from mixchat.kernels.cpu.compile import kernels_available
from mixchat.loading.loader import chunks_are_exact, load_engine
from mixchat.weights.families.read_config import read_config
from mixchat.weights.format.blueprint import Blueprint, Quantization

CPU = torch.device("cpu")
TOKENS = 70  # enough for products in bytes, which are for 16 tokens of an expert or more
CHUNKS = (1, 2, 7, 64, 2048)
FREE = SamplingOptions(temperature=1.0, seed=11)
# Forms of an installed model and of its cache: each takes other ways through the kernels.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], int | None]] = {
    "nf4": ({}, {}, None),
    "trellis3": ({}, {"quant_type": "trellis3"}, None),
    "attention and head in bf16": ({}, {"attention": 16, "head": 16}, None),
    "attention in nf4": ({}, {"attention": 4}, None),
    "dense in bf16": ({"dtype": "bfloat16"}, {"quant_type": "none"}, None),
    "dense in fp32": ({}, {"quant_type": "none"}, None),
    "8-bit cache": ({}, {}, 8),
    "sliding window": ({"sliding_window": 20}, {}, None),
    "w2 in 16 bits": ({"intermediate_size": 96}, {}, None),
    **{name: (changes, {}, None) for name, changes in WAYS.items()},
}

needs_kernels = pytest.mark.skipif(not kernels_available(), reason="the kernels need AVX2")


@pytest.fixture
def models(model_of: Callable[..., Path]) -> Callable[[str], Path]:
    """Return the installed model of a kind."""
    return lambda kind: model_of({"intermediate_size": 128, **KINDS[kind][0]}, KINDS[kind][1])


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def read(engine: Engine, chunks: list[int]) -> list[torch.Tensor]:
    """Return the cache's content after `TOKENS` tokens in these chunks, and the last logits."""
    engine.forget()
    ids, start = ids_of(TOKENS), 0
    for chunk in itertools.chain(chunks, itertools.repeat(chunks[-1])):
        if start >= TOKENS:
            break
        logits = engine.passes.compute(
            [SequenceTokens(engine.sequences[0], ids[start : start + chunk])], exact=True
        )
        start += chunk
    return [*cache_content(engine), logits]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def at_most(most: int, chunks: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(min(chunk, most) for chunk in chunks)


@pytest.mark.parametrize("kind", KINDS)
def test_each_token_has_the_bits_of_a_decoded_one_in_any_chunk_on_any_count_of_threads(
    models, threads, kind
):
    engine = load_engine(
        models(kind), LoadOptions(device="cpu", kv_bits=KINDS[kind][2], exact_prompts=True)
    )
    threads(1)
    decoded = read(engine, [1])
    ways = [*((1, (chunk,)) for chunk in CHUNKS), (2, (7,)), (2, (2048,)), (2, (33, 1, 5))]
    # If only one by one is exact, it is read so. Then many ways are the same.
    for count, chunks in {(count, at_most(engine.prefill_chunk, chunks)) for count, chunks in ways}:
        threads(count)
        assert same(read(engine, list(chunks)), decoded), (count, chunks)


@needs_kernels
@pytest.mark.parametrize("kind", ["nf4", "dense in bf16", "dense in fp32"])
def test_kernels_read_a_prompt_in_long_chunks_all_the_same(models, kind):
    engine = load_engine(models(kind), LoadOptions(device="cpu", exact_prompts=True))
    assert engine.prefill_chunk == PREFILL_CHUNK


@needs_kernels
@pytest.mark.parametrize(
    ("changes", "quantization", "apart"),
    [
        ({}, Quantization(), True),
        ({"hidden_size": 4}, Quantization(quant_type="none"), False),
        ({"intermediate_size": 96}, Quantization(), True),
        ({}, Quantization(quant_type="none", dtype=torch.float16), False),
    ],
)
def test_what_the_kernels_cannot_compute_is_read_token_by_token(changes, quantization, apart):
    shape = {
        "model_type": "mixtral",
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
    }
    blueprint = Blueprint(read_config({**shape, **changes}), quantization)
    assert chunks_are_exact(blueprint, CPU) == apart
    assert not chunks_are_exact(blueprint, torch.device("cuda"))


def test_a_seed_gives_the_same_text_in_one_process_and_in_the_next(models, tmp_path):
    """A conversation in one process had decoded keys and values of its answers, one that was
    resumed had read them as a prompt, multiplied otherwise: with the same seed its text parted."""
    options = LoadOptions(device="cpu", exact_prompts=True)
    model, prompt = models("nf4"), ids_of(40)
    engine = load_engine(model, options)
    first = answer(engine, prompt, FREE)
    PromptCache(tmp_path / "saved", engine).save()
    longer = [*prompt, *first, *ids_of(20)]
    expected = answer(engine, longer, FREE)
    assert engine.stats.reused_tokens == len(prompt) + len(first) - 1
    resumed = load_engine(model, options)
    assert answer(resumed, longer, FREE) == expected
    assert resumed.stats.reused_tokens == 0
    from_file = load_engine(model, options)
    assert PromptCache(tmp_path / "saved", from_file).load() == len(prompt) + len(first) - 1
    assert answer(from_file, longer, FREE) == expected
    assert same(read(resumed, [64]), read(engine, [1]))


@pytest.mark.parametrize("exact", [True, False])
def test_a_prompt_cache_is_only_used_by_prompts_that_are_read_like_it(models, tmp_path, exact):
    writer, reader = (
        load_engine(models("nf4"), LoadOptions(device="cpu", exact_prompts=how))
        for how in (exact, not exact)
    )
    answer(writer, ids_of(40))
    PromptCache(tmp_path / "saved", writer).save()
    how = "written" if exact else "not written"
    with pytest.raises(CheckpointError, match=f"was {how} with --exact-prompts"):
        PromptCache(tmp_path / "saved", reader).load()
    assert reader.held()[0] == []
