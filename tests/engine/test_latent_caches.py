"""Both kinds of cache with latents: pages for the CPU's kernel, tensors for torch."""

from dataclasses import replace

import pytest
import torch
from cache_tools import in_pages, in_tensors

from mixchat.engine.caches.layer_cache import Extent
from mixchat.engine.caches.sequence_cache import SequenceCache, cache_bytes
from mixchat.install.known_models import KNOWN
from mixchat.kernels.cpu.compile import kernels_available
from mixchat.kernels.cpu.pages import Bits
from mixchat.weights.families.read_config import read_config

CONFIG = replace(
    read_config(KNOWN["glm-4.7-flash"].config),
    num_hidden_layers=2,
    num_attention_heads=5,
    num_key_value_heads=5,
    kv_lora_rank=48,
    qk_rope_head_dim=16,
)
HEADS, LATENT, ROTATED = 5, 48, 16
needs_kernel = pytest.mark.skipif(not kernels_available(), reason="the kernel needs AVX2")


def paged(bits: Bits) -> SequenceCache:
    return in_pages(CONFIG, 2000, bits)


def of_tensors(bits: Bits) -> SequenceCache:
    return in_tensors(CONFIG, 2000, torch.float32 if bits == 32 else torch.bfloat16, bits)


KINDS = [pytest.param(paged, marks=needs_kernel), of_tensors]


def tokens_of(count: int, seed: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return queries, keys and values of new tokens."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (HEADS, LATENT + ROTATED), (1, ROTATED), (1, LATENT)
    return [torch.randn(count, *size, generator=generator).to(dtype) for size in sizes]


def conversation(cache: SequenceCache, dtype: torch.dtype, *turns: int) -> torch.Tensor:
    """Return the attention of the tokens of these turns in both layers: [T, layers, H, L]."""
    seen: list[torch.Tensor] = []
    for turn, count in enumerate(turns):
        new = (tokens_of(count, 2 * turn + layer, dtype) for layer in range(2))
        attended = (layer.attend(*x) for layer, x in zip(cache.layers, new, strict=True))  # type: ignore[attr-defined]
        seen.append(torch.stack([*attended], dim=1))
        cache.advance(count)
    return torch.cat(seen)


@needs_kernel
@pytest.mark.parametrize(
    ("bits", "dtype", "within"),
    [(32, torch.float32, 1e-5), (16, torch.bfloat16, 1e-2), (8, torch.bfloat16, 3e-2)],
)
@pytest.mark.parametrize("turns", [(5, 1, 1, 700, 1), (1,) * 20])
def test_both_kinds_see_the_same(
    bits: Bits, dtype: torch.dtype, within: float, turns: tuple[int, ...]
) -> None:
    one, other = (conversation(kind(bits), dtype, *turns) for kind in (paged, of_tensors))
    assert one.dtype == other.dtype == dtype
    assert (one.float() - other.float()).norm() < within * other.float().norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [8, 16])
def test_a_copy_that_was_cut_back_goes_on_with_the_same_bits(kind, bits: Bits) -> None:
    cache, copied = kind(bits), kind(bits)
    expected = conversation(cache, torch.bfloat16, 600, 30)[600:]
    cache.cut(600)
    for layer, copy in zip(cache.layers, copied.layers, strict=True):
        copy.copy_from(layer, Extent(600))
    copied.set_extent(Extent(600))
    for layer in range(2):
        for each in (cache, copied):
            new = tokens_of(30, 2 + layer, torch.bfloat16)
            attended = each.layers[layer].attend(*new)
            assert torch.equal(attended, expected[:, layer])


def test_a_latent_counts_once() -> None:
    assert cache_bytes(CONFIG, 1000, torch.bfloat16) == 2 * 1000 * (LATENT + ROTATED) * 2
    assert cache_bytes(CONFIG, 1000, torch.bfloat16, 8) == 2 * 1000 * (LATENT + ROTATED + 8)
