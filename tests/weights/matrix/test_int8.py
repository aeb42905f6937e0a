"""8-bit codes against the definition, computed slowly in double precision."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from matrix_tools import any_bits, from_bits, random

from mixchat.weights.matrix.int8 import INT8

SHAPES = ((64, 128), (96, 64), (40, 128), (3, 320), (1, 64))


def assert_coded(weight: torch.Tensor) -> None:
    """Check that each scale is the largest magnitude in bf16, and each code the nearest."""
    flat = weight.reshape(-1).double()
    codes, absmax = INT8.codes(weight)
    assert (codes.dtype, codes.shape) == (torch.int8, (len(flat),))
    largest = torch.stack([block.abs().max() for block in weight.reshape(-1).split(64)])
    assert torch.equal(absmax, largest.to(torch.bfloat16))
    scale = absmax.double().repeat_interleave(64)[: len(flat)]
    nearest = (flat * 127 / scale.where(scale != 0, 1)).clamp(-127, 127)
    assert ((codes.double() - nearest).abs() <= 0.5 + 1e-4).all()


@settings(max_examples=200)
@given(any_bits)
@example(np.zeros(64, np.uint16))
@example(np.arange(64, dtype=np.uint16))  # denormals only
@example(np.full(64, 0x7F7F, np.uint16))  # the largest there are
def test_each_code_is_the_nearest_to_its_weight(bits):
    assert_coded(from_bits(bits).view(1, -1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_of_every_type_and_shape_are_coded(dtype):
    for shape in SHAPES:
        assert_coded(random(*shape).to(dtype))


def test_a_scale_that_was_rounded_down_keeps_the_largest_weight_at_127():
    weight = torch.full((1, 64), 1.0001)  # 1 in bf16: 127.01 codes
    codes, absmax = INT8.codes(weight)
    assert codes[:64].tolist() == [127] * 64
    assert absmax[0] == 1


def test_a_code_lies_where_the_docstring_says():
    """Row 35, column 10: the second band, whose lines follow 64 / 2 lines of the first; there code
    2 * 3 + 0 of line 5. Its scale, of block 0 of row 35, is number 35 of 64."""
    codes, absmax = torch.zeros(64 * 64, dtype=torch.int8), torch.zeros(64, dtype=torch.bfloat16)
    codes[35 * 64 + 10] = -5
    absmax[35] = 1
    scales, packed = INT8.pack(codes, absmax, 64)
    assert packed.nonzero().tolist() == [[(32 + 5) * 64 + 6]]
    assert packed.min() == -5
    assert scales.nonzero().tolist() == [[35]]
