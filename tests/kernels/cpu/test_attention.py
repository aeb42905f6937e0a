"""Attention over pages against the plain formula in double precision."""

import inspect
import itertools

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
from mixchat.kernels.cpu.pages import PAGE, CacheShape, store

pytestmark = pytest.mark.skipif(not kernels_available(), reason="the kernel needs AVX2")

SHAPES = [(32, 8, 128), (9, 3, 64), (6, 2, 33), (48, 1, 16)]  # heads, groups, head_dim


@pytest.fixture(params=["avx512", "avx2"])
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> InstructionSet:
    """Each set that this CPU has, instead of the best."""
    if request.param == "avx512" and instruction_set() != "avx512":
        pytest.skip("the CPU has no AVX-512")
    monkeypatch.setattr(compiling, "instruction_set", lambda: request.param)
    return request.param


@pytest.fixture
def newly_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that are compiled again, for a CPU that lacks something."""
    monkeypatch.setattr(attention, "_compiled", compiled_here(inspect.unwrap(attention._compiled)))


class Pages:
    """One layer's cache with random keys and values, and these as they are."""

    def __init__(self, shape: CacheShape, tokens: int, dtype: torch.dtype) -> None:
        self.shape = shape
        count = -(-tokens // PAGE)
        self.pages = [torch.zeros(shape.page_bytes, dtype=torch.uint8) for _ in range(count)]
        self.addresses = torch.tensor([page.data_ptr() for page in self.pages])
        size = (tokens, shape.groups, shape.head_dim)
        self.keys, self.values = (random(size, seed).to(dtype) for seed in (1, 2))

    def store(self, start: int, end: int) -> None:
        part = slice(start, end)
        store(self.shape, self.addresses, start, self.keys[part], self.values[part])


def random(size: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def expected(
    cache: Pages,
    queries: torch.Tensor,
    past: int,
    window: int | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    shared, end = cache.shape.shared, past + len(queries)
    keys, values = (
        rows[:end].double().repeat_interleave(shared, dim=1) for rows in (cache.keys, cache.values)
    )
    scores = torch.einsum("thd,shd->hts", queries.double(), keys) * queries.shape[-1] ** -0.5
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


@pytest.mark.parametrize(
    ("bits", "dtype", "within", "has_sinks"),
    [
        (32, torch.float32, 3e-6, True),
        (16, torch.bfloat16, 3e-3, False),
        (8, torch.bfloat16, 2e-2, True),
        (8, torch.float32, 2e-2, False),
    ],
)
@pytest.mark.parametrize("size", SHAPES)
def test_it_is_the_plain_formula(instructions, size, bits, dtype, within, has_sinks):
    shape = CacheShape(*size, bits)
    sinks = 4 * random((shape.heads,), 4) if has_sinks else None
    for past, tokens, window in SITUATIONS:
        cache = Pages(shape, past + tokens, dtype)
        cache.store(0, past)
        cache.store(past, past + tokens)
        queries = 2 * random((tokens, shape.heads, shape.head_dim), 3).to(dtype)
        result = attention.attend(shape, cache.addresses, past, queries, window, sinks)
        assert result.dtype == dtype
        assert error(result, expected(cache, queries, past, window, sinks)) < within


def test_eight_bits_have_the_same_bits_by_other_instructions(newly_compiled, monkeypatch):
    """ARM has no instruction that adds pairs of products, and its sums are as exact."""
    shape = CacheShape(8, 2, 48, 8)
    cache = Pages(shape, PAGE + 30, torch.bfloat16)
    cache.store(0, PAGE + 30)
    queries = random((2, 8, 48), 3).bfloat16()
    results = [attention.attend(shape, cache.addresses, PAGE + 28, queries, None)]
    instructions = instruction_set()
    monkeypatch.setitem(CPUS, instructions, CPUS[instructions]._replace(add_words=None))
    monkeypatch.setattr(attention, "_compiled", compiled_here(inspect.unwrap(attention._compiled)))
    results.append(attention.attend(shape, cache.addresses, PAGE + 28, queries, None))
    assert torch.equal(*results)
    assert error(results[1], expected(cache, queries, PAGE + 28)) < 2e-2


@pytest.mark.parametrize("bits", [16, 8])
def test_a_query_that_is_no_number_has_no_attention(instructions, bits):
    """With integers it had some, and nobody learned that the weights were damaged."""
    shape = CacheShape(2, 1, 32, bits)
    cache = Pages(shape, 40, torch.bfloat16)
    cache.store(0, 40)
    queries = random((1, 2, 32), 3).bfloat16()
    queries[0, 1, 7] = torch.nan
    result = attention.attend(shape, cache.addresses, 39, queries, None)
    assert result[0, 0].isfinite().all()
    assert result[0, 1].isnan().all()


def test_a_token_alone_sees_what_it_sees_among_others(instructions):
    """To the bit: whether a prompt comes in one piece or in many must not show."""
    shape = CacheShape(8, 2, 32, 16)
    past, tokens = PAGE - 20, 60
    cache = Pages(shape, past + tokens, torch.bfloat16)
    cache.store(0, past + tokens)
    queries = random((tokens, 8, 32), 3).bfloat16()
    together = attention.attend(shape, cache.addresses, past, queries, None)
    alone = [
        attention.attend(shape, cache.addresses, past + token, queries[token : token + 1], None)
        for token in range(tokens)
    ]
    assert torch.equal(torch.cat(alone), together)


def test_neither_threads_nor_what_was_there_before_show(instructions):
    shape = CacheShape(8, 2, 32, 16)
    queries = random((30, 8, 32), 3).bfloat16()
    results = []
    for threads, used in itertools.product((1, 3), (False, True)):
        cache = Pages(shape, 2 * PAGE, torch.bfloat16)
        if used:  # a longer conversation, of which nothing is to be seen
            store(shape, cache.addresses, 0, cache.keys * 1e4, cache.values * 1e4)
        cache.store(0, PAGE + 10)
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        results.append(attention.attend(shape, cache.addresses, PAGE - 20, queries, None))
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_one_key_of_great_weight_is_all_that_is_seen(instructions):
    """Scores far apart: e to the power of their difference neither overflows nor becomes NaN."""
    shape = CacheShape(1, 1, 32, 32)
    cache = Pages(shape, 300, torch.float32)
    cache.keys[:] *= 1e-3
    cache.keys[17] = 1e3
    cache.store(0, 300)
    queries = torch.full((1, 1, 32), 1e3)
    result = attention.attend(shape, cache.addresses, 299, queries, None)
    torch.testing.assert_close(result[0], cache.values[17])


def test_a_sink_may_take_all_weight_or_none(instructions):
    shape = CacheShape(4, 2, 32, 32)
    cache = Pages(shape, PAGE + 1, torch.float32)
    cache.store(0, PAGE + 1)
    queries = random((1, 4, 32), 3)
    plain = attention.attend(shape, cache.addresses, PAGE, queries, None)
    sinks = torch.tensor([-torch.inf, -3e38, 3e38, torch.nan])
    result = attention.attend(shape, cache.addresses, PAGE, queries, None, sinks)
    assert torch.equal(result[:, :2], plain[:, :2])
    assert result[:, 2].abs().max() == 0
    assert result[:, 3].isnan().all()


def test_with_eight_bits_a_large_key_costs_no_other_its_precision(instructions):
    shape = CacheShape(4, 4, 64, 8)
    cache = Pages(shape, 100, torch.float32)
    cache.values[40] *= 1e4
    cache.keys[40] *= -1e-3
    cache.store(0, 100)
    queries = random((1, 4, 64), 3)
    queries[:, :, 0] = 0
    result = attention.attend(shape, cache.addresses, 39, queries, None)
    assert error(result, expected(cache, queries, 39)) < 2e-2


def test_a_page_takes_what_its_numbers_take():
    bf16, eight = CacheShape(32, 8, 128, 16), CacheShape(32, 8, 128, 8)
    assert bf16.page_bytes == 2 * PAGE * 8 * 128 * 2
    assert eight.page_bytes == 2 * PAGE * 8 * (128 + 4)
