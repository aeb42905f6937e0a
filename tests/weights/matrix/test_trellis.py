"""The codes of a trellis: their search against all beginnings, their scales, and their errors."""

import pytest
import torch
from matrix_tools import random, there_and_back

from mixchat.weights.matrix.quant_type import Inputs, Way
from mixchat.weights.matrix.trellis import (
    TABLE_2,
    TABLE_3,
    TRELLIS2,
    TRELLIS3,
    bytes_of_scales,
    scales_of_bytes,
)

each_table = pytest.mark.parametrize("table", [TABLE_2, TABLE_3], ids=["2", "3"])
each_type = pytest.mark.parametrize("kind", [TRELLIS2, TRELLIS3], ids=["2", "3"])


@pytest.mark.parametrize(("kind", "most"), [(TRELLIS2, 0.078), (TRELLIS3, 0.0215)])
def test_normal_numbers_err_as_little_as_the_docstring_says(kind, most):
    """Four separate levels leave 0.117 without the error of a scale, and eight leave 0.035."""
    weight = random(256, 256)
    again = there_and_back(kind, weight)
    assert (again - weight).square().mean() < most


@pytest.mark.parametrize(("plane", "bits"), [(0, 0b01010101), (1, 0b10101010)])
def test_each_of_two_planes_has_its_own_bits_in_the_kernels_order(plane, bits):
    """Planes that were exchanged on the way there and back passed this file's tests."""
    codes = torch.zeros(2, 16, 3, 8, dtype=torch.uint8)  # [bands, columns, ring and planes, bytes]
    codes[:, :, 1 + plane] = 0xFF
    packed = TRELLIS3.packed(codes, 16).view(2, -1)
    assert not packed[:, :128].any()  # the ring
    assert (packed[:, 128:] == bits).all()
    assert torch.equal(TRELLIS3.unpacked(packed, 16).reshape(codes.shape), codes)


@each_type
def test_an_outlier_is_not_cut_off(kind):
    weight = random(64, 64)
    weight[3, 5] = 6
    again = there_and_back(kind, weight)
    assert abs(again[3, 5] - 6) < 1.5


def test_a_scale_is_the_nearest_float_of_eight_bits():
    every = torch.cat((torch.zeros(1), (torch.arange(8, 256) % 8 + 8) / 8.0))
    every[1:] *= 2.0 ** (torch.arange(8, 256) // 8 - 25)
    made = bytes_of_scales(every)
    assert made.tolist() == [0, *range(8, 256)]
    assert torch.equal(scales_of_bytes(made), every)
    given = torch.logspace(-6, 1.99, 500)
    found = scales_of_bytes(bytes_of_scales(given))
    assert torch.equal(found, every[(given[:, None] - every).abs().argmin(-1)])
    assert scales_of_bytes(bytes_of_scales(torch.tensor([1e-30, 1e30]))).tolist() == [
        every[1],
        every[-1],
    ]


@each_type
def test_error_feedback_lowers_the_error_of_products_that_were_held_out(kind):
    common = random(8, 128, seed=1)
    rows = random(600, 8, seed=2) @ common + random(600, 128, seed=3)
    taken: list[tuple[Way, float, float]] = []
    inputs = Inputs(rows[:500], rows[500:], lambda *result: taken.append(result))
    kind.codes(random(64, 128), inputs=inputs)
    ((way, error, plain),) = taken
    assert way == "gptq"
    assert error < 0.7 * plain
