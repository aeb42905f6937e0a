"""8-bit codes against the definition, computed slowly in double precision."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mixchat.weights.matrix.int8 import INT8

SHAPES = ((64, 128), (96, 64), (40, 128), (3, 320), (1, 64))


def random(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator)


def each_absmax(absmax: torch.Tensor, count: int) -> torch.Tensor:
    """The scale of each of `count` weights, in double precision."""
    return absmax.double().repeat_interleave(64)[:count]


def assert_coded(weight: torch.Tensor) -> None:
    """Check that each scale is the largest magnitude in bf16, and each code the nearest."""
    flat = weight.reshape(-1).double()
    codes, absmax = INT8.codes(weight)
    assert (codes.dtype, codes.shape) == (torch.int8, (len(flat),))
    largest = torch.stack([block.abs().max() for block in weight.reshape(-1).split(64)])
    assert torch.equal(absmax, largest.to(torch.bfloat16))
    scale = each_absmax(absmax, len(flat))
    nearest = (flat * 127 / scale.where(scale != 0, 1)).clamp(-127, 127)
    assert ((codes.double() - nearest).abs() <= 0.5 + 1e-4).all()


# Blocks of any bits, which are repeated: zeros of both signs, denormals, extremes.
any_bits = st.binary(min_size=2, max_size=400).map(
    lambda data: np.resize(np.frombuffer(data[: len(data) // 2 * 2], np.uint16), 3 * 64)
)


@settings(max_examples=200)
@given(any_bits)
@example(np.zeros(64, np.uint16))
@example(np.arange(64, dtype=np.uint16))  # denormals only
@example(np.full(64, 0x7F7F, np.uint16))  # the largest there are
def test_each_code_is_the_nearest_to_its_weight(bits):
    finite = np.where(bits & 0x7F80 == 0x7F80, bits & ~np.uint16(0x0080), bits)
    assert_coded(torch.from_numpy(finite.view(np.int16)).view(torch.bfloat16).view(1, -1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_of_every_type_and_shape_are_coded(dtype):
    for shape in SHAPES:
        assert_coded(random(*shape).to(dtype))


def test_a_scale_that_was_rounded_down_keeps_the_largest_weight_at_127():
    weight = torch.full((1, 64), 1.0001)  # 1 in bf16: 127.01 codes
    codes, absmax = INT8.codes(weight)
    assert codes[:64].tolist() == [127] * 64
    assert absmax[0] == 1


def test_a_parameter_is_encoded_also_in_inference_mode():
    weight = torch.nn.Parameter(random(3, 64))
    outside, before = INT8.codes(weight), torch.get_num_threads()
    with torch.inference_mode():
        inside = INT8.codes(weight)
    assert torch.equal(outside[0], inside[0])
    assert torch.equal(outside[1], inside[1])
    assert torch.get_num_threads() == before


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
