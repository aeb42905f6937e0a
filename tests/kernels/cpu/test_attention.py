"""Attention over pages against the plain formula in double precision.

Latents are keys whose first numbers are their values. They are stored once.
"""

import inspect
import itertools

import pytest
import torch
from matmul_tools import random

from mixchat.kernels.cpu import attention
from mixchat.kernels.cpu import compile as compiling
from mixchat.kernels.cpu.compile import CPUS, compiled_here, instruction_set, kernels_available
from mixchat.kernels.cpu.pages import PAGE, CacheShape, store

pytestmark = pytest.mark.skipif(not kernels_available(), reason="the kernel needs AVX2")

LATENTS = [(20, 1, 576, 512), (3, 1, 41, 33), (128, 1, 48, 32)]
# Heads, groups, the numbers of a key, and those of them that are a latent's value.
SIZES = [(32, 8, 128, 0), (9, 3, 64, 0), (6, 2, 33, 0), (48, 1, 16, 0), *LATENTS]
each_size = pytest.mark.parametrize("size", SIZES, ids=str)
# A number of new tokens behind others: on one page, over its edge, over several, with a window.
SITUATIONS = [
    (0, 1, None),
    (0, 40, None),
    (PAGE - 3, 1, None),
    (PAGE - 3, 7, None),
    (3 * PAGE + 5, 2, None),
    (700, 9, 100),
    (0, 130, 7),
    (1500, 1, 64),
    (100, 3, 1),
]


def compile_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let kernels be compiled again, for a CPU that lacks something."""
    monkeypatch.setattr(attention, "_compiled", compiled_here(inspect.unwrap(attention._compiled)))
    # Files of machine code are for a CPU's own features.
    monkeypatch.setattr("mixchat.kernels.cpu.object_cache.ObjectCache.load", lambda self: None)
    monkeypatch.setattr("mixchat.kernels.cpu.object_cache.ObjectCache.save", lambda self, code: 0)


class Pages:
    """One layer's cache with random keys and values, and these as they are."""

    def __init__(self, shape: CacheShape, tokens: int, dtype: torch.dtype) -> None:
        self.shape = shape
        count = -(-tokens // PAGE)
        self.pages = [torch.zeros(shape.page_bytes, dtype=torch.uint8) for _ in range(count)]
        self.addresses = torch.tensor([page.data_ptr() for page in self.pages])
        sizes = ((tokens, shape.groups, dim) for dim in (shape.key_dim, shape.value_dim))
        self.keys, self.values = (random(*size, seed=seed) for seed, size in enumerate(sizes, 1))
        if shape.latent_dim:  # what keys alone have is no norm's output, and may be larger
            self.keys *= 20
        self.keys, self.values = self.keys.to(dtype), self.values.to(dtype)

    def store(self, start: int, end: int, factor: float = 1) -> None:
        keys, values = (rows[start:end] * factor for rows in (self.keys, self.values))
        store(self.shape, self.addresses, start, keys, values)

    def queries(self, tokens: int) -> torch.Tensor:
        queries = random(tokens, self.shape.heads, self.shape.head_dim, seed=3)
        if self.shape.latent_dim:
            queries[..., self.shape.latent_dim :] /= 10
        return queries.to(self.keys.dtype)

    def attend(
        self,
        past: int,
        queries: torch.Tensor,
        window: int | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return attention.attend(self.shape, self.addresses, past, queries, window, sinks)

    def expected(
        self,
        past: int,
        queries: torch.Tensor,
        window: int | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        end = past + len(queries)
        whole = torch.cat([self.values, self.keys], -1) if self.shape.latent_dim else self.keys
        keys, values = (
            rows[:end].double().repeat_interleave(self.shape.shared, dim=1)
            for rows in (whole, self.values)
        )
        scores = torch.einsum("thd,shd->hts", queries.double(), keys) * self.shape.score_scale
        back = torch.arange(past, end)[:, None] - torch.arange(end)
        hidden = (back < 0) | (back >= (window or end))
        scores = scores.masked_fill(hidden, -torch.inf)
        if sinks is not None:
            column = sinks.double()[:, None, None].expand(*scores.shape[:2], 1)
            scores = torch.cat([scores, column], -1)
        weights = scores.softmax(-1)[..., :end]
        return torch.einsum("hts,shd->thd", weights, values)


def error(result: torch.Tensor, exact: torch.Tensor) -> float:
    return float((result.double() - exact).norm() / exact.norm())


def shape_of(size, bits):
    *sizes, latent_dim = size
    return CacheShape(*sizes, bits, latent_dim, scale=0.07 if latent_dim else None)


def assert_plain(shape, dtype, within, sinks=None):
    """Compare the attention of all situations with the plain formula."""
    for past, tokens, window in SITUATIONS:
        cache = Pages(shape, past + tokens, dtype)
        cache.store(0, past)
        cache.store(past, past + tokens)
        queries = cache.queries(tokens) * (1 if shape.latent_dim else 2)
        result = cache.attend(past, queries, window, sinks)
        assert result.dtype == dtype
        assert error(result, cache.expected(past, queries, window, sinks)) < within


@pytest.mark.parametrize(
    ("bits", "dtype", "within", "has_sinks"),
    [
        (32, torch.float32, 3e-6, True),
        (16, torch.bfloat16, 3e-3, False),
        (8, torch.bfloat16, 2e-2, True),
        (8, torch.float32, 2e-2, False),
    ],
)
@each_size
def test_it_is_the_plain_formula(instructions, size, bits, dtype, within, has_sinks):
    shape = shape_of(size, bits)
    sinks = 4 * random(shape.heads, seed=4) if has_sinks else None
    assert_plain(shape, dtype, within * (1.5 if shape.latent_dim else 1), sinks)


def assert_same_alone(shape):
    """Compare tokens together with each alone, whatever a page held before."""
    past, tokens = PAGE - 20, 60
    cache = Pages(shape, past + tokens, torch.bfloat16)
    cache.store(0, past + tokens, factor=100)
    cache.store(0, past + tokens)
    queries = cache.queries(tokens)
    together = cache.attend(past, queries)
    alone = [cache.attend(past + at, queries[at : at + 1]) for at in range(tokens)]
    assert torch.equal(torch.cat(alone), together)


@pytest.mark.parametrize(
    "shape",
    [CacheShape(8, 2, 32, 16), *(CacheShape(11, 1, 80, bits, 64) for bits in (32, 16, 8))],
    ids=str,
)
def test_a_token_alone_sees_what_it_sees_among_others(instructions, shape):
    """To the bit: whether a prompt comes in one piece or in many must not show."""
    assert_same_alone(shape)


@pytest.mark.parametrize("size", LATENTS, ids=str)
def test_latents_in_bf16_need_no_instructions_for_its_products(size, monkeypatch):
    if instruction_set() != "avx512":
        pytest.skip("only AVX-512 has them")
    has = compiling.has_feature
    monkeypatch.setattr(compiling, "has_feature", lambda name: name != "avx512bf16" and has(name))
    compile_again(monkeypatch)
    assert_plain(shape_of(size, 16), torch.bfloat16, 4e-3)
    assert_same_alone(CacheShape(11, 1, 80, 16, 64))


@pytest.mark.parametrize("shape", [CacheShape(8, 2, 48, 8), CacheShape(6, 1, 96, 8, 64)], ids=str)
def test_eight_bits_have_the_same_bits_by_other_instructions(shape, monkeypatch):
    """ARM has no instruction that adds pairs of products, and its sums are as exact."""
    cache = Pages(shape, PAGE + 30, torch.bfloat16)
    cache.store(0, PAGE + 30)
    queries = cache.queries(2)
    results = [cache.attend(PAGE + 28, queries)]
    instructions = instruction_set()
    monkeypatch.setitem(CPUS, instructions, CPUS[instructions]._replace(add_words=None))
    compile_again(monkeypatch)
    results.append(cache.attend(PAGE + 28, queries))
    assert torch.equal(*results)
    assert error(results[1], cache.expected(PAGE + 28, queries)) < 3e-2


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("size", [(2, 1, 32, 0), (2, 1, 48, 32)], ids=str)
def test_a_query_that_is_no_number_has_no_attention(instructions, size, bits):
    """With integers it had some, and nobody learned that the weights were damaged."""
    cache = Pages(shape_of(size, bits), 40, torch.bfloat16)
    cache.store(0, 40)
    queries = cache.queries(1)
    queries[0, 1, -8] = torch.nan
    result = cache.attend(39, queries)
    assert result[0, 0].isfinite().all()
    assert result[0, 1].isnan().all()


def test_neither_threads_nor_what_was_there_before_show(instructions):
    shape = CacheShape(8, 2, 32, 16)
    results = []
    for threads, used in itertools.product((1, 3), (False, True)):
        cache = Pages(shape, 2 * PAGE, torch.bfloat16)
        if used:  # a longer conversation, of which nothing is to be seen
            cache.store(0, 2 * PAGE, factor=1e4)
        cache.store(0, PAGE + 10)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        results.append(cache.attend(PAGE - 20, cache.queries(30)))
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_one_key_of_great_weight_is_all_that_is_seen(instructions):
    """Scores far apart: e to the power of their difference neither overflows nor becomes NaN."""
    cache = Pages(CacheShape(1, 1, 32, 32), 300, torch.float32)
    cache.keys[:] *= 1e-3
    cache.keys[17] = 1e3
    cache.store(0, 300)
    result = cache.attend(299, torch.full((1, 1, 32), 1e3))
    torch.testing.assert_close(result[0], cache.values[17])


def test_a_sink_may_take_all_weight_or_none(instructions):
    cache = Pages(CacheShape(4, 2, 32, 32), PAGE + 1, torch.float32)
    cache.store(0, PAGE + 1)
    queries = cache.queries(1)
    plain = cache.attend(PAGE, queries)
    sinks = torch.tensor([-torch.inf, -3e38, 3e38, torch.nan])
    result = cache.attend(PAGE, queries, sinks=sinks)
    assert torch.equal(result[:, :2], plain[:, :2])
    assert result[:, 2].abs().max() == 0
    assert result[:, 3].isnan().all()


def test_with_eight_bits_a_large_key_costs_no_other_its_precision(instructions):
    cache = Pages(CacheShape(4, 4, 64, 8), 100, torch.float32)
    cache.values[40] *= 1e4
    cache.keys[40] *= -1e-3
    cache.store(0, 100)
    queries = cache.queries(1)
    queries[:, :, 0] = 0
    assert error(cache.attend(39, queries), cache.expected(39, queries)) < 2e-2


def test_a_page_takes_what_its_numbers_take_and_of_latents_once():
    assert CacheShape(32, 8, 128, 16).page_bytes == 2 * PAGE * 8 * 128 * 2
    assert CacheShape(32, 8, 128, 8).page_bytes == 2 * PAGE * 8 * (128 + 4)
    assert CacheShape(20, 1, 576, 16, 512).page_bytes == PAGE * 576 * 2
    assert CacheShape(20, 1, 576, 8, 512).page_bytes == PAGE * (576 + 8)
