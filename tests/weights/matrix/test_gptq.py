"""Rounding for given inputs: against its definition, and against the nearest levels."""

import pytest
import torch
from matrix_tools import random, there_and_back

from mixchat.weights.matrix import gptq
from mixchat.weights.matrix.encode import best_way
from mixchat.weights.matrix.nf4 import NF4, Quantized4bit
from mixchat.weights.matrix.quant_type import Inputs, Way
from mixchat.weights.matrix.trellis import TRELLIS3


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


def shrunk_hessian(inputs: torch.Tensor) -> torch.Tensor:
    x = inputs.double()
    hessian = x.T @ x / len(x) * (1 - gptq.shrinkage(*x.shape))
    hessian.diagonal().copy_(gptq.mean_squares(inputs))
    return hessian


def slowly(
    weight: torch.Tensor, scales: torch.Tensor, levels: torch.Tensor, inputs: torch.Tensor
) -> torch.Tensor:
    """Column by column in double precision: after each, the columns behind it are chosen anew for
    the least error of all products (ordinary least squares)."""
    rows, columns = weight.shape
    hessian = shrunk_hessian(inputs)
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


@pytest.mark.parametrize("is_in_pieces", [False, True])
def test_it_is_least_squares_for_the_columns_that_are_left(monkeypatch, is_in_pieces):
    if is_in_pieces:  # of what is computed at once
        monkeypatch.setattr(gptq, "_BAND", 48)
        monkeypatch.setattr(gptq, "_PIECE", 70)
    weight, inputs = random(16, 128), alike(300, 128)
    levels = NF4.levels
    _, scales = NF4.codes(weight, search=True)
    fast = torch.empty(128, 16, dtype=torch.uint8)
    rounded = gptq.nearest_levels(levels, fast)
    gptq.round_columns(
        weight, scales.float().view(16, -1), rounded, gptq.feedback_of(inputs).factor
    )
    fast = fast.T.reshape(-1, 64)
    assert (fast != slowly(weight, scales.float(), levels, inputs)).float().mean() < 0.005


def test_fitted_scales_are_the_least_squares_solution_of_each_row():
    weight, inputs = random(600, 192), alike(300, 192)
    hessian, feedback = shrunk_hessian(inputs), gptq.feedback_of(inputs)
    codes, spread = random(600, 192, seed=7).sign() * 0.5 + weight, torch.rand(600, 3)
    scales = 0.75 + 0.5 * spread  # a scale that fits badly would be kept
    scales[5, 1] = 0
    codes[5, 64:128] = 0
    each = scales.repeat_interleave(64, 1)
    found = gptq.fitted_scales(weight, codes * each, scales, feedback)
    assert found[5, 1] == 0

    def loss(some: torch.Tensor) -> torch.Tensor:
        wrong = (codes * some.repeat_interleave(64, 1) - weight).double()
        return ((wrong @ hessian) * wrong).sum(-1)

    least = loss(found)
    for block in range(3):
        for change in (0.99, 1.01):
            other = found.clone()
            other[:, block] *= change
            assert (loss(other) >= least * (1 - 1e-5)).all()


def noisy(rows: torch.Tensor) -> Inputs:
    """Inputs as they are after a matrix before was rounded coarsely, and the exact ones."""
    wrong = rows + 0.3 * (rows.abs().mean(0) * random(*rows.shape, seed=5)) - 0.2 * rows.roll(1, -1)
    half = len(rows) // 2
    exact = rows[:half], rows[half:]
    return Inputs(wrong[:half], wrong[half:], lambda *_: None, exact)


def test_a_corrected_weight_is_the_least_squares_solution():
    weight, inputs = random(16, 128), noisy(alike(600, 128))
    assert inputs.exact is not None
    given, exact = inputs.fit.double(), inputs.exact[0].double()
    kept = 1 - gptq.shrinkage(*given.shape)
    moved = weight.double() @ (exact - given).T @ given / len(given) * kept
    expected = weight + moved @ torch.linalg.inv(shrunk_hessian(inputs.fit))
    found = gptq.corrected(weight, gptq.feedback_of(inputs.fit), inputs)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


def test_a_matrix_makes_up_for_what_was_rounded_before_it():
    """The second matrix of an expert learnt from inputs that it never gets."""
    weight, inputs = random(64, 128).bfloat16(), noisy(alike(4000, 128))
    assert inputs.exact is not None
    exact = halves(torch.cat(inputs.exact))
    errors = []
    for learnt in (exact, inputs):
        made = NF4.codes(weight, inputs=learnt)
        matrix = Quantized4bit(NF4, 64, 128, *made).dense(torch.float32)
        errors.append(gptq.error_of_products(matrix, weight, inputs))
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("shape", [(64, 256), (40, 192)])
def test_products_with_the_inputs_and_with_others_like_them_get_better(shape):
    torch.manual_seed(0)
    weight, every = random(*shape).bfloat16(), alike(2000, shape[1])
    inputs, others = every[::2], every[1::2]

    def error(made: tuple[torch.Tensor, torch.Tensor], rows: torch.Tensor) -> float:
        apart = Quantized4bit(NF4, *shape, *made).dense(torch.float32) - weight.float()
        return float((apart @ rows.T).norm())

    plain, fitted = NF4.codes(weight), NF4.codes(weight, inputs=halves(inputs))
    for rows in (inputs, others):
        assert error(fitted, rows) < 0.75 * error(plain, rows)


def test_few_inputs_zeros_and_columns_that_are_never_used_do_no_harm():
    weight = random(32, 128).bfloat16()
    weight[3] = 0
    weight[5, :64] = 0
    unused = alike(100, 128)
    unused[:, 10:20] = 0
    for inputs in (alike(3, 128), torch.zeros(5, 128), unused):
        codes, scales = NF4.codes(weight, inputs=halves(inputs))
        matrix = Quantized4bit(NF4, 32, 128, codes, scales).dense(torch.float32)
        assert matrix.isfinite().all()
        assert not matrix[3].any()
        assert (matrix - weight.float()).norm() < 0.5 * weight.float().norm()


@pytest.mark.parametrize("kind", [NF4, TRELLIS3], ids=["nf4", "trellis3"])
@pytest.mark.parametrize(("count", "going_together"), [(8, True), (32, False), (128, True)])
def test_products_with_others_like_few_inputs_get_no_worse(count, going_together, kind):
    """GPTQ fitted the noise of few inputs: its codes made other products up to twice as wrong."""
    every = (alike if going_together else random)(1000 + count, 256, 1)
    weight = random(64, 256).bfloat16()

    def error(inputs: Inputs | None) -> float:
        apart = there_and_back(kind, weight, inputs) - weight.float()
        return float((apart @ every[count:].T).norm())

    assert error(halves(every[:count])) < 1.02 * error(None)


def test_codes_that_lose_on_what_was_held_out_are_not_taken():
    """The rows that are held out use other columns than the rest, which nobody can foresee."""
    weight, chosen = random(64, 128).bfloat16(), list[Way]()
    rows = alike(200, 128)
    rows[100:] = random(100, 128) * rows[:100].square().mean(0).rsqrt()
    made = NF4.codes(weight, inputs=halves(rows, chosen))
    plain = NF4.codes(weight, search=True)
    assert chosen == ["plain"]
    assert all(torch.equal(one, other) for one, other in zip(made, plain, strict=True))


@pytest.mark.parametrize(
    ("errors", "best"),
    [
        ((1, 1.02, 1.03), "plain"),
        ((1, 0.98, 1.02), "weighted"),
        ((1, 0.98, 0.99), "weighted"),
        ((1, 1.02, 0.98), "gptq"),
        ((1, 0.99, 0.98), "gptq"),
        ((1, 1, 1), "plain"),
    ],
)
def test_of_ways_a_few_percent_apart_the_one_with_the_least_error_is_taken(errors, best):
    """A guard that was 5% too loose passed every test."""
    weight, noise, taken = random(32, 64), random(32, 64, seed=1), list[tuple[Way, float]]()
    ways: tuple[Way, ...] = ("plain", "weighted", "gptq")
    rows = random(20, 64, seed=2)
    inputs = Inputs(rows, rows, lambda way, error, plain: taken.append((way, error / plain)))
    made = [(weight + error**0.5 * noise, torch.ones(1)) for error in errors]
    found = best_way(zip(ways, made, strict=True), lambda codes, _: codes, weight, inputs)
    ((way, error),) = taken
    assert way == best
    assert found is made[ways.index(best)]
    assert error == pytest.approx(errors[ways.index(best)], rel=1e-4)
