"""MXFP4 against transformers' reading of it, and the way weights are rounded to it."""

import pytest
import torch
from matrix_tools import random, swapped
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from mixchat.weights.matrix.mxfp4 import LARGEST_SCALE, MXFP4
from mixchat.weights.matrix.nf4 import Quantized4bit

SHAPE = (48, 96)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_each_code_under_each_scale_is_what_transformers_reads(dtype):
    pairs = torch.arange(256, dtype=torch.uint8)
    blocks = pairs.view(16, 16).repeat(LARGEST_SCALE + 1, 1)  # 16 blocks have all pairs of codes
    scales = torch.arange(LARGEST_SCALE + 1, dtype=torch.uint8).repeat_interleave(16)
    expected = convert_moe_packed_tensors(blocks[None, None], scales[None, None], dtype=dtype)
    shape = (1, 32 * len(scales))
    result = Quantized4bit(MXFP4, *shape, swapped(blocks.view(-1)), scales).dense(dtype)
    assert result.isfinite().all()
    assert torch.equal(result.view(-1), expected.view(-1))


def test_weights_that_are_in_the_format_are_kept():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(256, (48 * 48,), generator=generator, dtype=torch.uint8)
    codes[::16] = 0x7F  # the largest level in each block, which its scale is found by
    scales = torch.randint(LARGEST_SCALE + 1, (48 * 3,), generator=generator, dtype=torch.uint8)
    weight = Quantized4bit(MXFP4, *SHAPE, codes, scales).dense(torch.float32)
    again, found = MXFP4.codes(weight)
    assert torch.equal(found, scales)
    assert torch.equal(again, codes)


def test_no_other_code_and_no_other_power_of_two_is_nearer():
    weight = random(*SHAPE)
    codes, scales = MXFP4.codes(weight)
    made = Quantized4bit(MXFP4, *SHAPE, codes, scales).dense(torch.float32).view(-1, 32)
    blocks, values = weight.view(-1, 32), MXFP4.scales(scales).unsqueeze(-1)
    possible = MXFP4.levels * values.unsqueeze(-1)  # [B, 1, 16]
    nearest = (blocks.unsqueeze(-1) - possible).abs().amin(-1)
    torch.testing.assert_close((blocks - made).abs(), nearest)
    largest = blocks.abs().amax(-1) / values.squeeze(-1)
    assert (largest >= 3.5).all()
    assert (largest < 7).all()
