"""Codes of 6 bits where they differ from others: their bits' places, and their scales."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrix_tools import random, there_and_back

from mixchat.weights.matrix import int6
from mixchat.weights.matrix.int6 import INT6
from mixchat.weights.matrix.int8 import INT8
from mixchat.weights.matrix.nf4 import NF4
from mixchat.weights.matrix.quant_type import BlockCodes, Inputs


def error(kind: BlockCodes, weight: torch.Tensor) -> float:
    again = there_and_back(kind, weight)
    return float((again.double() - weight).norm() / weight.double().norm())


def place_of(row: int, column: int) -> tuple[int, int, int, int]:
    """The docstring's words for one of 64 rows and 64 columns: (word, bit) of low and high bits."""
    group = (row // 32 * 64 + column) // 8  # of 32 rows
    word = 2 * (row % 16) + column % 2
    code = 2 * (column % 8 // 2) + row % 32 // 16
    first = 32 * 3 * group + word
    return first + 32 * (code // 4), 4 * (code % 4), first + 32 * 2, 2 * code


@settings(max_examples=50)
@given(st.integers(0, 63), st.integers(0, 63), st.integers(0, 63))
def test_a_code_lies_where_the_docstring_says(row, column, code):
    separate = torch.zeros(64, 64, dtype=torch.uint8)
    separate[row, column] = code
    codes = INT6._pack_blocks(separate).view(-1)
    _, packed = INT6.pack(codes, torch.zeros(64, dtype=torch.bfloat16), 64)
    words = [number % 2**16 for number in packed.view(torch.int16).tolist()]
    low, low_bit, high, high_bit = place_of(row, column)
    assert words[low] >> low_bit == code % 16
    assert words[high] >> high_bit == code // 16
    assert sum(words) == (code % 16 << low_bit) + (code // 16 << high_bit)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_weight_of_either_sign_is_at_the_longer_end(sign):
    """A block of even numbers in which the largest magnitude is one level more is kept."""
    half = 32
    block = sign * torch.arange(-half, half).repeat(64 // (2 * half)).view(1, 64) / half
    _, scales = INT6.codes(block)
    assert error(INT6, block) < 0.01 / half
    assert scales[0] * sign > 0


@pytest.mark.parametrize(("height", "width"), [(160, 128), (70, 192), (5, 64)])
def test_rows_are_encoded_some_at_a_time(height, width, monkeypatch):
    """A head of 151,936 rows took 4.4 GB of memory to calibrate, for three copies in fp32."""
    weight, rows, chosen = random(height, width), random(500, width, seed=1), []
    whole = INT6.codes(weight)
    every = Inputs(rows[:400], rows[400:], lambda *way: chosen.append(way))
    calibrated = there_and_back(INT6, weight, every)
    monkeypatch.setattr(int6, "ROWS_AT_ONCE", 64)
    assert all(map(torch.equal, INT6.codes(weight), whole))
    some = there_and_back(INT6, weight, every)
    assert len(chosen) == 1 + -(-height // 64)
    products = [(again - weight) @ rows[400:].T for again in (calibrated, some)]
    assert products[1].norm() < 1.01 * products[0].norm()


@pytest.mark.parametrize("spread", [1.0, 1e-30, 1e30])
def test_each_bit_more_halves_the_error(spread):
    """Of normal weights: 8.3% with NF4, 2.3%, and 0.6% with two bits more."""
    weight = random(256, 1024) * spread
    four, six, eight = (error(kind, weight) for kind in (NF4, INT6, INT8))
    assert 0.022 < six < 0.0235
    assert four > 3.4 * six
    assert six > 3 * eight


def test_searched_scales_leave_less_than_the_largest_magnitude():
    weight = random(64, 1024)
    blocks = weight.bfloat16().float().view(-1, 64)
    scale, half = blocks.abs().amax(-1, keepdim=True), 32
    plain = (blocks / scale * half).round().clamp(-half, half - 1) / half * scale
    searched = there_and_back(INT6, weight).view(-1, 64)
    errors = [(one - blocks).square().sum(-1) for one in (searched, plain)]
    # One that rounding in bf16 and the table of errors can hide.
    assert (errors[0] <= errors[1] * 1.01).all()
    assert errors[0].sum() < 0.92 * errors[1].sum()
