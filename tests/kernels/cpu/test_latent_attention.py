"""Attention over latents, which are stored once, against the plain formula in double precision."""

import inspect

import pytest
import torch

from mixchat.kernels.cpu import attention
from mixchat.kernels.cpu import compile as compiling
from mixchat.kernels.cpu.compile import (
    CPUS,
    InstructionSet,
    compiled_here,
    instruction_set,
    kernels_available,
)
from mixchat.kernels.cpu.pages import PAGE, Bits, CacheShape, store

pytestmark = pytest.mark.skipif(not kernels_available(), reason="the kernel needs AVX2")

SHAPES = [(20, 576, 512), (3, 41, 33), (128, 48, 32)]  # heads, numbers of a latent, of its value
SITUATIONS = [
    (0, 1, None),
    (0, 40, None),
    (PAGE - 3, 7, None),
    (3 * PAGE + 5, 2, None),
    (700, 9, 100),
]


@pytest.fixture(params=["avx512bf16", "avx512", "avx2"])
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> InstructionSet:
    """Each set that this CPU has, instead of the best."""
    name = "avx2" if request.param == "avx2" else "avx512"
    if name == "avx512" and instruction_set() != "avx512":
        pytest.skip("the CPU has no AVX-512")
    monkeypatch.setattr(compiling, "instruction_set", lambda: name)
    if request.param == "avx512bf16":
        if not compiling.has_feature("avx512bf16"):
            pytest.skip("the CPU has no AVX512-BF16")
    else:
        has_feature = compiling.has_feature
        monkeypatch.setattr(
            compiling, "has_feature", lambda name: name != "avx512bf16" and has_feature(name)
        )
        compile_again(monkeypatch)
    return name


def compile_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_compiled", compiled_here(inspect.unwrap(attention._compiled)))
    # Files of machine code are for a CPU's own features.
    monkeypatch.setattr("mixchat.kernels.cpu.object_cache.ObjectCache.load", lambda self: None)
    monkeypatch.setattr("mixchat.kernels.cpu.object_cache.ObjectCache.save", lambda self, code: 0)


class Pages:
    """One layer's cache with random latents."""

    def __init__(self, shape: CacheShape, tokens: int, dtype: torch.dtype) -> None:
        self.shape = shape
        count = -(-tokens // PAGE)
        self.pages = [torch.zeros(shape.page_bytes, dtype=torch.uint8) for _ in range(count)]
        self.addresses = torch.tensor([page.data_ptr() for page in self.pages])
        self.latents = random((tokens, 1, shape.head_dim), 1)
        # The part of keys alone is no norm's output, and may be of another size.
        self.latents[..., shape.latent_dim :] *= 20
        self.latents = self.latents.to(dtype)

    def store(self, start: int, end: int) -> None:
        store_latents(self, self.latents[start:end], start)

    def queries(self, tokens: int) -> torch.Tensor:
        queries = random((tokens, self.shape.heads, self.shape.head_dim), 3)
        queries[..., self.shape.latent_dim :] /= 10
        return queries.to(self.latents.dtype)

    def attend(self, past: int, queries: torch.Tensor, window: int | None = None) -> torch.Tensor:
        return attention.attend(self.shape, self.addresses, past, queries, window)

    def expected(self, past: int, queries: torch.Tensor, window: int | None = None) -> torch.Tensor:
        end = past + len(queries)
        latents = self.latents[:end, 0].double()
        scores = torch.einsum("thd,sd->hts", queries.double(), latents) * self.shape.score_scale
        back = torch.arange(past, end)[:, None] - torch.arange(end)
        hidden = (back < 0) | (back >= (window or end))
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return torch.einsum("hts,sd->thd", weights, latents[:, : self.shape.latent_dim])


def store_latents(cache: Pages, latents: torch.Tensor, past: int = 0) -> None:
    values, keys = latents.split([cache.shape.value_dim, cache.shape.key_dim], -1)
    store(cache.shape, cache.addresses, past, keys, values)


def random(size: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def error(result: torch.Tensor, exact: torch.Tensor) -> float:
    return float((result.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(
    ("bits", "dtype", "within"),
    [(32, torch.float32, 3e-6), (16, torch.bfloat16, 4e-3), (8, torch.bfloat16, 3e-2)],
)
@pytest.mark.parametrize("size", SHAPES)
def test_it_is_the_plain_formula(
    instructions: InstructionSet,
    size: tuple[int, int, int],
    bits: Bits,
    dtype: torch.dtype,
    within: float,
) -> None:
    heads, head_dim, latent_dim = size
    shape = CacheShape(heads, 1, head_dim, bits, latent_dim, scale=0.07)
    for past, tokens, window in SITUATIONS:
        cache = Pages(shape, past + tokens, dtype)
        cache.store(0, past)
        cache.store(past, past + tokens)
        queries = cache.queries(tokens)
        result = cache.attend(past, queries, window)
        assert result.dtype == dtype
        assert error(result, cache.expected(past, queries, window)) < within


@pytest.mark.parametrize("bits", [32, 16, 8])
def test_a_token_alone_sees_what_it_sees_among_others(
    instructions: InstructionSet, bits: Bits
) -> None:
    """To the bit, whatever rows share an item of work, and whatever a page held before."""
    shape = CacheShape(11, 1, 80, bits, 64)
    past, tokens = PAGE - 20, 60
    cache = Pages(shape, past + tokens, torch.bfloat16)
    store_latents(cache, cache.latents * 100)
    cache.store(0, past + tokens)
    queries = cache.queries(tokens)
    together = cache.attend(past, queries)
    alone = [cache.attend(past + at, queries[at : at + 1]) for at in range(tokens)]
    assert torch.equal(torch.cat(alone), together)


def test_eight_bits_have_the_same_bits_by_other_instructions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """ARM has no instruction that adds pairs of products, and its sums are as exact."""
    shape = CacheShape(6, 1, 96, 8, 64)
    cache = Pages(shape, PAGE + 30, torch.bfloat16)
    cache.store(0, PAGE + 30)
    queries = cache.queries(2)
    results = [cache.attend(PAGE + 28, queries)]
    instructions = instruction_set()
    assert instructions is not None
    monkeypatch.setitem(CPUS, instructions, CPUS[instructions]._replace(add_words=None))
    compile_again(monkeypatch)
    results.append(cache.attend(PAGE + 28, queries))
    assert torch.equal(*results)


@pytest.mark.parametrize("bits", [16, 8])
def test_a_query_that_is_no_number_has_no_attention(
    instructions: InstructionSet, bits: Bits
) -> None:
    shape = CacheShape(2, 1, 48, bits, 32)
    cache = Pages(shape, 40, torch.bfloat16)
    cache.store(0, 40)
    queries = cache.queries(1)
    queries[0, 1, 40] = torch.nan
    result = cache.attend(39, queries)
    assert result[0, 0].isfinite().all()
    assert result[0, 1].isnan().all()


def test_a_latent_takes_its_numbers_once() -> None:
    assert CacheShape(20, 1, 576, 16, 512).page_bytes == PAGE * 576 * 2
    assert CacheShape(20, 1, 576, 8, 512).page_bytes == PAGE * (576 + 8)
