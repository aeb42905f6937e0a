"""Both kinds of cache, of heads and of latents: pages for the CPU's kernel, tensors for torch."""

from dataclasses import replace

import pytest
import torch
from cache_tools import attend, in_pages, in_tensors
from engine_tools import answer

from mixchat.base.model_config import ModelConfig
from mixchat.base.options import LoadOptions
from mixchat.engine.caches import paged_cache, sequence_cache
from mixchat.engine.caches.paged_cache import PagedKVCache
from mixchat.engine.caches.sequence_cache import SequenceCache, bytes_seen, cache_bytes, new_caches
from mixchat.engine.caches.tensor_cache import TensorKVCache, attention_mask
from mixchat.install.known_models import KNOWN
from mixchat.kernels.cpu.compile import kernels_available
from mixchat.kernels.cpu.pages import Bits
from mixchat.loading.loader import load_engine
from mixchat.weights.families.read_config import read_config

CPU = torch.device("cpu")
PLAIN = read_config(
    {
        "model_type": "mixtral",
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
    }
)
CONFIG = replace(PLAIN, layer_types=("sliding_attention", "full_attention"), sliding_window=400)
SINKS = None, torch.tensor([2.0, -1.0, 4.0, 0.0])  # of each layer
HEADS, LATENT, ROTATED = 5, 48, 16
LATENTS = replace(
    read_config(KNOWN["glm-4.7-flash"].config),
    num_hidden_layers=2,
    num_attention_heads=HEADS,
    num_key_value_heads=HEADS,
    kv_lora_rank=LATENT,
    qk_rope_head_dim=ROTATED,
)
each_form = pytest.mark.parametrize("config", [CONFIG, LATENTS], ids=["heads", "latents"])
needs_kernel = pytest.mark.skipif(not kernels_available(), reason="the kernel needs AVX2")


def paged(bits: Bits, config: ModelConfig = CONFIG) -> SequenceCache:
    return in_pages(config, 2000, bits)


def of_tensors(bits: Bits, config: ModelConfig = CONFIG) -> SequenceCache:
    return in_tensors(config, 2000, torch.float32 if bits == 32 else torch.bfloat16, bits)


KINDS = [pytest.param(paged, marks=needs_kernel), of_tensors]


def turn(cache: SequenceCache, dtype: torch.dtype, tokens: int, seed: int) -> list[torch.Tensor]:
    """Return the attention of new tokens in each layer, which do not count yet."""
    generator = torch.Generator().manual_seed(seed)
    if cache.config is not LATENTS:
        return attend(cache, torch.randn(2, tokens, 8, 16, generator=generator).to(dtype), SINKS)
    sizes = (HEADS, LATENT + ROTATED), (1, ROTATED), (1, LATENT)
    new = [
        [torch.randn(tokens, *size, generator=generator).to(dtype) for size in sizes]
        for _ in cache.layers
    ]
    return [layer.attend(*x) for layer, x in zip(cache.layers, new, strict=True)]  # type: ignore[attr-defined]


def conversation(cache: SequenceCache, dtype: torch.dtype, *turns: int) -> torch.Tensor:
    """Return the attention of the tokens of these turns in both layers: [layers, T, H, h]."""
    seen: list[torch.Tensor] = []
    for seed, tokens in enumerate(turns):
        seen.append(torch.stack(turn(cache, dtype, tokens, seed)))
        cache.advance(tokens)
    return torch.cat(seen, dim=1)


def held(cache: SequenceCache) -> int:
    """Return the bytes of a cache."""
    pages = [page for layer in cache.layers for page in getattr(layer, "_pages", [])]
    tensors = [pair[1] for layer in cache.layers for pair in getattr(layer, "_stored", {}).values()]
    return sum(tensor.nbytes for tensor in (*pages, *tensors))


@needs_kernel
@pytest.mark.parametrize(
    ("bits", "dtype", "within"),
    [(32, torch.float32, 1e-5), (16, torch.bfloat16, 1e-2), (8, torch.bfloat16, 3e-2)],
)
@pytest.mark.parametrize("turns", [(5, 1, 1, 700, 1), (1,) * 20])
@each_form
def test_both_kinds_see_the_same(bits, dtype, within, turns, config):
    one, other = (conversation(kind(bits, config), dtype, *turns) for kind in (paged, of_tensors))
    assert one.dtype == other.dtype == dtype
    assert (one.float() - other.float()).norm() < within * other.float().norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("length", [0, 600])
@each_form
def test_what_was_cut_off_is_written_over_also_in_a_copy(kind, bits, length, config):
    cache, copied = kind(bits, config), kind(bits, config)
    if length:
        conversation(cache, torch.bfloat16, length)
    expected = turn(cache, torch.bfloat16, 700, 1)
    cache.advance(700)
    cache.cut(length)
    if length:
        copied.copy_from(cache, length)
    for each in (cache, copied):
        assert all(map(torch.equal, turn(each, torch.bfloat16, 700, 1), expected))


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_cache_takes_no_memory(kind):
    cache = kind(16)
    assert held(cache) == 0
    conversation(cache, torch.bfloat16, 10)
    little = held(cache)
    conversation(cache, torch.bfloat16, 1900)
    assert 0 < 3 * little < held(cache)


def test_a_layer_with_a_window_counts_what_it_keeps_and_what_it_reads():
    """A window of 400 keeps 2,048 more, in whole pages, and one page that is half full."""
    token = 2 * 2 * 16 * 2  # bytes in one layer
    assert cache_bytes(CONFIG, 20_000, torch.bfloat16) == (20_000 + 512 + 2048 + 512) * token
    assert bytes_seen(CONFIG, 20_000, torch.bfloat16) == (20_000 + 400) * token


def test_the_bytes_of_a_full_cache():
    assert cache_bytes(CONFIG, 1000, torch.bfloat16) == 2 * 2 * 1000 * 2 * 16 * 2
    assert cache_bytes(CONFIG, 1000, torch.float32) == 2 * 2 * 1000 * 2 * 16 * 4
    assert cache_bytes(CONFIG, 1000, torch.bfloat16, 8) == 2 * 2 * 1000 * 2 * (16 + 4)
    # A latent counts once.
    assert cache_bytes(LATENTS, 1000, torch.bfloat16) == 2 * 1000 * (LATENT + ROTATED) * 2
    assert cache_bytes(LATENTS, 1000, torch.bfloat16, 8) == 2 * 1000 * (LATENT + ROTATED + 8)


def test_the_device_chooses_the_kind(monkeypatch):
    expected = PagedKVCache if kernels_available() else TensorKVCache
    [cache] = new_caches(CONFIG, 10, torch.bfloat16, [CPU, CPU])
    assert {type(layer) for layer in cache.layers} == {expected}
    monkeypatch.setattr(sequence_cache, "kernels_available", lambda: False)
    [cache] = new_caches(CONFIG, 10, torch.bfloat16, [CPU, CPU])
    assert {type(layer) for layer in cache.layers} == {TensorKVCache}


@pytest.mark.parametrize("kernel", [pytest.param(True, marks=needs_kernel), False])
def test_ctrl_c_while_the_cache_grows_leaves_the_next_turn_right(tiny_model, monkeypatch, kernel):
    """In a prefill, between the keys and the values, or a page and its address: each turn failed
    from then on."""
    monkeypatch.setattr(sequence_cache, "kernels_available", lambda: kernel)

    def text() -> list[int]:
        return answer(engine, range(5, 37), max_tokens=20)

    options = LoadOptions(device="cpu")
    engine = load_engine(tiny_model, options)
    expected = text()
    engine = load_engine(tiny_model, options)
    owner, name = (paged_cache.pages, "store") if kernel else (TensorKVCache, "_put")
    real, calls = getattr(owner, name), iter(range(1000))

    def broken_off(*arguments: object) -> None:
        if next(calls) == 1:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(owner, name, broken_off)
    with pytest.raises(KeyboardInterrupt):
        text()
    assert text() == expected


@pytest.mark.parametrize(
    ("past", "tokens", "window", "expected"),
    [
        (5, 1, None, None),
        (0, 2, None, [[1, 0], [1, 1]]),
        (1, 2, None, [[1, 1, 0], [1, 1, 1]]),
        (1, 2, 2, [[1, 1, 0], [0, 1, 1]]),
        (1, 1, 2, None),
        (3, 1, 2, [[0, 0, 1, 1]]),
    ],
)
def test_the_mask(past, tokens, window, expected):
    mask = attention_mask(past, tokens, window)
    assert (None if mask is None else mask.int().tolist()) == expected
