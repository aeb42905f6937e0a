"""Rounding for given inputs: against its definition, and against the nearest levels."""

import pytest
import torch

from mixchat.weights.matrix import gptq
from mixchat.weights.matrix.nf4 import NF4
from mixchat.weights.matrix.quant_type import BlockCodes, Inputs, Way

each_type = pytest.mark.parametrize("kind", [NF4], ids=["nf4"])


def random(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator)


def alike(rows: int, columns: int, seed: int = 1) -> torch.Tensor:
    """Inputs whose columns go together in part, and are of very different size."""
    common = random(rows, 8, seed) @ random(8, columns, seed + 1)
    sizes = torch.logspace(-1, 1, columns)[torch.randperm(columns)]
    return (common + 2 * random(rows, columns, seed + 2)) * sizes


def halves(rows: torch.Tensor, chosen: list[Way] | None = None) -> Inputs:
    """Inputs of which the half is held out; the way that is taken is added to `chosen`."""
    ways = [] if chosen is None else chosen
    half = (len(rows) + 1) // 2
    return Inputs(rows[:half], rows[half:], lambda way, *_: ways.append(way))


def slowly(
    weight: torch.Tensor, scales: torch.Tensor, levels: torch.Tensor, inputs: torch.Tensor
) -> torch.Tensor:
    """Column by column in double precision: after each, the columns behind it are chosen anew for
    the least error of all products (ordinary least squares)."""
    rows, columns = weight.shape
    x = inputs.double()
    hessian = x.T @ x / len(x)
    shrunk = gptq.shrinkage(len(x), columns)
    hessian *= 1 - shrunk
    hessian.diagonal().copy_(gptq.mean_squares(inputs))
    left, codes = weight.double().clone(), torch.empty(rows, columns, dtype=torch.uint8)
    each = scales.double().view(rows, -1).repeat_interleave(64, 1)
    for place in range(columns):
        wanted = left[:, place]
        nearest = (wanted.unsqueeze(-1) / each[:, place, None] - levels.double()).abs().argmin(-1)
        codes[:, place] = nearest
        error = levels.double()[nearest] * each[:, place] - wanted
        behind = slice(place + 1, columns)
        if place + 1 < columns:
            moved = torch.linalg.solve(hessian[behind, behind], hessian[behind, place])
            left[:, behind] -= error.unsqueeze(-1) * moved
    return codes.view(-1, 64)


@each_type
def test_it_is_least_squares_for_the_columns_that_are_left(kind: BlockCodes) -> None:
    weight, inputs = random(16, 128), alike(300, 128)
    levels = kind.levels
    _, scales = kind.codes(weight, search=True)
    fast = torch.empty(128, 16, dtype=torch.uint8)
    rounded = gptq.nearest_levels(levels, fast)
    gptq.round_columns(weight, scales.float(), rounded, gptq.feedback_factor(inputs))
    fast = fast.T.reshape(-1, 64)
    assert (fast != slowly(weight, scales.float(), levels, inputs)).float().mean() < 0.005


def test_the_factor_makes_the_shrunk_hessian_whatever_is_computed_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = alike(300, 128)
    whole = gptq.feedback_factor(inputs)
    monkeypatch.setattr(gptq, "_BAND", 48)
    monkeypatch.setattr(gptq, "_PIECE", 70)
    in_bands = gptq.feedback_factor(inputs)
    torch.testing.assert_close(in_bands, whole, rtol=1e-3, atol=1e-4)
    x = inputs.double()
    hessian = x.T @ x / len(x) * (1 - gptq.shrinkage(*x.shape))
    hessian.diagonal().copy_(gptq.mean_squares(inputs))
    undone = torch.linalg.inv(in_bands.double())
    diagonal = undone @ hessian @ undone.T
    assert torch.equal(in_bands, in_bands.triu())
    torch.testing.assert_close(in_bands.diagonal(), torch.ones(128))
    sizes = diagonal.diagonal().sqrt()
    off = (diagonal - diagonal.diagonal().diag()) / sizes / sizes.unsqueeze(-1)
    assert off.abs().max() < 1e-3


@each_type
@pytest.mark.parametrize("shape", [(64, 256), (48, 192), (32, 64), (40, 100), (7, 65)])
def test_products_with_the_inputs_and_with_others_like_them_get_better(
    kind: BlockCodes, shape: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    weight, every = random(*shape).bfloat16(), alike(2000, shape[1])
    inputs, others = every[::2], every[1::2]

    def error(made: tuple[torch.Tensor, torch.Tensor], rows: torch.Tensor) -> float:
        apart = kind.dequantize(*made, shape, torch.float32) - weight.float()
        return float((apart @ rows.T).norm())

    plain, fitted = kind.codes(weight), kind.codes(weight, inputs=halves(inputs))
    bound = 0.75 if shape[1] % 64 == 0 else 0.97
    for rows in (inputs, others):
        assert error(fitted, rows) < bound * error(plain, rows)


@each_type
def test_few_inputs_zeros_and_columns_that_are_never_used_do_no_harm(kind: BlockCodes) -> None:
    weight = random(32, 128).bfloat16()
    weight[3] = 0
    weight[5, :64] = 0
    unused = alike(100, 128)
    unused[:, 10:20] = 0
    for inputs in (alike(3, 128), torch.zeros(5, 128), unused):
        codes, scales = kind.codes(weight, inputs=halves(inputs))
        matrix = kind.dequantize(codes, scales, (32, 128), torch.float32)
        assert matrix.isfinite().all()
        assert not matrix[3].any()
        assert (matrix - weight.float()).norm() < 0.5 * weight.float().norm()


@each_type
@pytest.mark.parametrize("count", [8, 32, 128])
@pytest.mark.parametrize("going_together", [False, True])
def test_products_with_others_like_few_inputs_get_no_worse(
    kind: BlockCodes, count: int, going_together: bool
) -> None:
    """GPTQ fitted the noise of few inputs: its codes made other products up to twice as wrong."""
    every = (alike if going_together else random)(1000 + count, 256, 1)
    weight = random(64, 256).bfloat16()

    def error(made: tuple[torch.Tensor, torch.Tensor]) -> float:
        apart = kind.dequantize(*made, (64, 256), torch.float32) - weight.float()
        return float((apart @ every[count:].T).norm())

    plain = kind.codes(weight, search=True)
    fitted = kind.codes(weight, inputs=halves(every[:count]))
    assert error(fitted) < 1.01 * error(plain)


def test_codes_that_lose_on_what_was_held_out_are_not_taken() -> None:
    """What is held out uses other columns than the rest, which nobody can foresee."""
    weight, chosen = random(64, 128).bfloat16(), list[Way]()
    rows = alike(200, 128)
    rows[100:] = random(100, 128) * rows[:100].square().mean(0).rsqrt()
    made = NF4.codes(weight, inputs=halves(rows, chosen))
    plain = NF4.codes(weight, search=True)
    assert chosen == ["plain"]
    assert all(torch.equal(one, other) for one, other in zip(made, plain, strict=True))
