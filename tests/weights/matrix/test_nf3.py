"""3-bit codes where they differ from others: their three bytes, and their scales."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixchat.weights.matrix import nf3
from mixchat.weights.matrix.nf3 import NF3


def random(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator)


def test_eight_codes_lie_in_three_bytes():
    codes = torch.tensor([1, 2, 3, 4, 5, 6, 7, 2], dtype=torch.uint8)
    z = 7 + 8 * 2  # 23: 3 + 4 * 1 + 16 * 1
    assert z == 23
    packed = [1 + 8 * 2 + 64 * 3, 3 + 8 * 4 + 64 * 1, 5 + 8 * 6 + 64 * 1]
    assert nf3.pack(codes).tolist() == packed


@given(st.lists(st.integers(0, 7), min_size=8, max_size=8))
def test_every_code_comes_back(codes):
    given_codes = torch.tensor(codes, dtype=torch.uint8)
    assert torch.equal(nf3.unpack(nf3.pack(given_codes)), given_codes)


def test_a_code_lies_where_the_layout_says():
    """Row 35, column 13: in the second band row 3, of the lower half, so it has an even code. The
    columns 8 to 15 are the second group of 96 bytes; there column 5 is column 1 of pair 2, which
    the third 32 bytes hold: byte 2 * 3 + 1."""
    levels = torch.full((64, 64), 0, dtype=torch.uint8)
    levels[35, 13] = 5
    codes = nf3.pack(levels.view(-1, 8)).view(-1)
    packed, _ = NF3.to_packed_layout(codes, torch.zeros(64, dtype=torch.bfloat16), 64, 64)
    place = 32 * 64 * 3 // 8 + 96 + 2 * 32 + 7
    assert packed.nonzero().tolist() == [[place]]
    assert packed[place] == 5


@pytest.mark.parametrize("sign", [1, -1])
def test_weights_that_are_levels_are_kept(sign):
    """All levels occur in each block, in either direction: the scale is found within a step."""
    weight = sign * NF3.levels.repeat(4, 8).bfloat16() * 3
    codes, scales = NF3.codes(weight)
    again = NF3.dequantize(codes, scales, (4, 64), torch.float32)
    assert (again - weight).abs().max() < 0.05 * 3


def test_3_bits_cost_a_sixth_of_normal_weights():
    """The best of 8 levels and of all scales for blocks of 64 normal numbers leaves 0.164."""
    weight = random(256, 1024)
    again = NF3.dequantize(*NF3.codes(weight), (256, 1024), torch.float32)
    assert 0.160 < (again - weight).norm() / weight.norm() < 0.168
