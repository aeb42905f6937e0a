"""Tools that the tests of products with 4-bit codes and with 8-bit codes have in common."""

from collections.abc import Callable
from typing import Any

import pytest
import torch


def random(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator)


def error(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result.double() - expected).norm() / expected.norm())


class AnyCodes:
    """Tests for matrices of any codes, each with every `unit` of the module that inherits them.

    `Matrix(rows, columns)` can be called with x, and has the numbers of its codes as `exact`;
    `within` returns how far a unit's product may be from theirs.
    """

    Matrix: Callable[[int, int], Any]
    within: Callable[[str], float]

    def test_blocks_of_very_different_size_keep_their_precision(self, unit: str) -> None:
        """One large number in x must not cost the others their digits: models have such."""
        matrix, x = self.Matrix(64, 256), random(2, 256, seed=1)
        x[:, 64:128] *= 1e4
        x[:, 128:192] *= 1e-4
        assert error(matrix(x), x.double() @ matrix.exact.T) < self.within(unit)
        x[:, 64:128] = 0
        assert error(matrix(x), x.double() @ matrix.exact.T) < self.within(unit)

    def test_zeros_give_zeros(self, unit: str) -> None:
        assert torch.equal(self.Matrix(32, 128)(torch.zeros(2, 128)), torch.zeros(2, 32))

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_what_is_no_number_stays_visible_and_to_its_token(
        self, unit: str, bad: float, dtype: torch.dtype
    ) -> None:
        matrix, x = self.Matrix(32, 128), random(3, 128, seed=1).to(dtype)
        good = matrix(x)
        x[1, 77] = bad
        result = matrix(x)
        assert not result[1].isfinite().any()
        assert torch.equal(result[::2], good[::2])

    def test_the_shape_and_type_of_x_are_kept(self, unit: str) -> None:
        matrix = self.Matrix(32, 64)
        assert matrix(random(6, 64).view(2, 3, 64)).shape == (2, 3, 32)
        assert matrix(random(1, 64)[0]).shape == (32,)
        assert matrix(random(0, 64)).shape == (0, 32)
        assert matrix(random(6, 128)[:, ::2]).shape == (6, 32)
        assert matrix(random(1, 64).half()).dtype == torch.float16
