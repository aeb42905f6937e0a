"""The kernel that finds the codes of a trellis, against a slow search in torch."""

import pytest
import torch
from matmul_tools import three_threads
from trellis_reference import least_path, search

from mixchat.kernels.cpu import compile as compiling
from mixchat.kernels.cpu import trellis_encode
from mixchat.kernels.cpu.compile import LANES, InstructionSet, instruction_set, kernels_available
from mixchat.kernels.cpu.trellis_encode import encode_trellis
from mixchat.weights.matrix.trellis import TABLE_2, TABLE_3
from mixchat.weights.matrix.trellis_table import TrellisTable

pytestmark = pytest.mark.skipif(not kernels_available(), reason="the kernel needs AVX2")
each_table = pytest.mark.parametrize("table", [TABLE_2, TABLE_3], ids=["2 bits", "3 bits"])


def columns(count: int, table: TrellisTable) -> tuple[torch.Tensor, torch.Tensor]:
    """Return normal numbers that suit the table, and weights of their errors."""
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, 64, generator=generator) * table.sigma
    return x, torch.rand(count, 64, generator=generator) + 0.1


@each_table
@pytest.mark.parametrize("instructions", LANES)
def test_it_finds_the_numbers_that_a_slow_search_finds(
    table: TrellisTable, instructions: InstructionSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    if instructions == "avx512" and instruction_set() != "avx512":
        pytest.skip("the CPU has no AVX-512")
    for module in (compiling, trellis_encode):
        monkeypatch.setattr(module, "instruction_set", lambda: instructions)
    assert [one.shape for one in encode_trellis(*columns(0, table), table.levels)][1] == (0, 64)
    for count in (1, 37):
        x, weights = columns(count, table)
        with three_threads():
            words, numbers = encode_trellis(x, weights, table.levels)
        _, expected = search(table, x, weights)
        assert torch.equal(numbers, expected)
        assert torch.equal(table.numbers(words.view(torch.uint8).view(count, -1, 8)), numbers)
        assert torch.equal(encode_trellis(numbers, weights, table.levels)[1], numbers)


def test_rows_without_weight_cost_nothing() -> None:
    """Rows that fill up a ring have none. Their numbers are free to serve the others."""
    x, weights = columns(20, TABLE_2)
    errors = []
    for number in (0.0, 1.0):
        weights[:, 40:], x[:, 40:] = 0, number
        _, numbers = encode_trellis(x, weights, TABLE_2.levels)
        errors.append((weights * (x - numbers).square()).sum())
    assert errors[0] == errors[1]


def weighted(x: torch.Tensor, numbers: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return ((x - numbers).square() * weight).sum(-1).double()


def least_error(table: TrellisTable, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The least error of rings [n, 64], out of the best sequences that begin with each window."""
    numbers = table.by_subset
    errors = (x.T[:, None, None] - numbers[..., None]).square().amin(1) * weight.T[:, None]
    best = torch.full((len(x),), torch.inf)
    for window in range(128):
        path = least_path(table, errors, torch.full((len(x),), window))
        total = errors.gather(1, table.subsets[path].unsqueeze(1)).sum((0, 1))
        best = torch.minimum(best, total)
    return best.double()


@each_table
def test_the_search_comes_near_the_best_sequence_of_a_ring(table: TrellisTable) -> None:
    x, weight = columns(24, table)
    _, numbers = encode_trellis(x, weight, table.levels)
    error, least = weighted(x, numbers, weight), least_error(table, x, weight)
    assert (error >= least * (1 - 1e-5)).all()
    assert error.sum() <= 1.02 * least.sum()


@each_table
def test_words_stand_for_the_numbers_that_were_chosen(table: TrellisTable) -> None:
    x, _ = columns(40, table)
    words, numbers = encode_trellis(x, torch.ones_like(x), table.levels)
    eight = words.view(torch.uint8).view(40, table.bits, 8)
    assert torch.equal(table.numbers(eight), numbers)
