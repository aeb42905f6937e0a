import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from matrix_tools import any_bits, from_bits, random, random_weight

from mixchat.weights.matrix import encode
from mixchat.weights.matrix.nf4 import NF4
from mixchat.weights.matrix.quant_type import BLOCKSIZE

each_way = pytest.mark.parametrize("search", [False, True])

LEVELS = NF4.levels
BOUNDARIES = (LEVELS[1:] + LEVELS[:-1]) / 2


def assert_as_bitsandbytes(weight: torch.Tensor) -> None:
    codes, absmax = NF4.codes(weight)
    rounded = weight.to(torch.bfloat16)
    expected, state = bnb.quantize_4bit(rounded, blocksize=BLOCKSIZE, quant_type="nf4")
    assert torch.equal(codes, expected.view(-1))
    assert torch.equal(absmax, state.absmax.to(torch.bfloat16))


def squared_errors(weight: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Of each block, in float64."""
    nibbles = torch.stack((codes >> 4, codes & 0xF), dim=-1).view(-1, BLOCKSIZE).int()
    numbers = scales.double().unsqueeze(-1) * LEVELS.double()[nibbles]
    return (weight.view(-1, BLOCKSIZE).double() - numbers).square().sum(-1)


# Any bits with exponents close together, so that all codes occur.
alike_bits = st.builds(
    lambda bits, exponent: (bits & 0x81FF) + (min(exponent, 250) << 7),
    any_bits,
    st.integers(0, 255),
).map(lambda bits: bits.astype(np.uint16))


@settings(max_examples=200)
@given(st.one_of(any_bits, alike_bits))
@example(np.zeros(64, np.uint16))
@example(np.full(64, 0x8000, np.uint16))
@example(np.arange(64, dtype=np.uint16))  # denormals only
@example(np.full(64, 0x7F7F, np.uint16))
def test_any_weights_are_coded_as_bitsandbytes_codes_them(bits):
    assert_as_bitsandbytes(from_bits(bits).view(1, -1))


def around_the_boundaries() -> tuple[torch.Tensor, torch.Tensor]:
    """Every finite absmax there is [A], and the four bf16 numbers nearest to each boundary times it
    [A, 60]. A code can only go wrong there, so this stands for all pairs of weight and absmax."""
    absmax = torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16)
    near = (absmax.double().unsqueeze(-1) * BOUNDARIES.double()).to(torch.bfloat16)
    sign = near.view(torch.int16) & -0x8000
    magnitude = (near.view(torch.int16) & 0x7FFF).unsqueeze(-1) + torch.arange(-2, 2)
    magnitude = magnitude.clamp(min=0).minimum(absmax.view(torch.int16).view(-1, 1, 1))
    bits = magnitude.to(torch.int16) | sign.unsqueeze(-1)
    return absmax, bits.view(-1, 60).view(torch.bfloat16)


def test_all_weights_around_a_boundary_are_coded_as_bitsandbytes_codes_them():
    absmax, around = around_the_boundaries()
    assert_as_bitsandbytes(torch.cat((absmax.unsqueeze(-1).expand(-1, 4), around), dim=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(64, 64), (3, 320)])
def test_every_type_is_rounded_to_bf16_first(dtype, shape):
    assert_as_bitsandbytes(random(*shape).to(dtype))


@each_way
def test_neither_pieces_nor_threads_nor_neighbours_change_a_block(monkeypatch, search):
    weight = random_weight(63, 192)
    codes, scales = NF4.codes(weight, search=search)
    monkeypatch.setattr(encode, "_PIECE", 7 * BLOCKSIZE)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    again = NF4.codes(weight, search=search)
    assert torch.equal(codes, again[0])
    assert torch.equal(scales, again[1])
    for block in range(0, 189, 17):
        alone = NF4.codes(weight.view(1, -1)[:, block * 64 : (block + 1) * 64], search=search)
        assert torch.equal(alone[0], codes[block * 32 : (block + 1) * 32])
        assert torch.equal(alone[1], scales[block : block + 1])


@settings(max_examples=200)
@given(st.one_of(any_bits, alike_bits))
@example(np.zeros(128, np.uint16))
@example(np.arange(64, dtype=np.uint16))
@example(np.full(64, 0x7F7F, np.uint16))
def test_no_block_of_any_weights_is_worse_for_the_search(bits):
    weight = from_bits(bits).view(1, -1)
    plain = squared_errors(weight, *NF4.codes(weight))
    searched = squared_errors(weight, *NF4.codes(weight, search=True))
    assert (searched <= plain).all()


def test_the_search_comes_near_the_best_of_all_scales():
    """Against 1,000 scales a block: a squared error within 3% over all, and 25% in each block."""
    weight = random_weight(1, 400 * BLOCKSIZE).view(-1, BLOCKSIZE)
    searched = squared_errors(weight, *NF4.codes(weight, search=True))
    absmax = weight.float().abs().amax(-1, keepdim=True)
    best = torch.full((400,), torch.inf)
    for factor in torch.linspace(0.7, 1.5, 500):
        for scale in (absmax * factor, -absmax * factor):
            levels = LEVELS[torch.bucketize(weight.float() / scale, BOUNDARIES)]
            best = torch.minimum(best, (weight.float() - scale * levels).square().sum(-1))
    assert searched.sum() < 1.03 * best.sum()
    assert (searched < 1.25 * best).all()


def test_the_search_finds_the_scale_of_weights_that_are_levels():
    """Blocks whose largest weight is the level 0.72 of their scale, of either sign: no error."""
    levels = LEVELS[1:15].repeat(5)[:BLOCKSIZE]
    weight = torch.stack((levels, -levels)).to(torch.bfloat16)
    plain = squared_errors(weight, *NF4.codes(weight))
    searched = squared_errors(weight, *NF4.codes(weight, search=True))
    assert (searched < 0.1 * plain).all()


def test_bitsandbytes_decodes_the_scales_of_the_search_negative_ones_too():
    weight = random_weight(32, 128)
    codes, scales = NF4.codes(weight, search=True)
    assert (scales < 0).any()
    assert (scales > 0).any()
    _, state = bnb.quantize_4bit(weight.float(), blocksize=BLOCKSIZE, quant_type="nf4")
    state.absmax = scales.float()
    decoded = bnb.dequantize_4bit(codes.view(-1, 1), state)
    error = (decoded.double() - weight.double()).square().view(-1, BLOCKSIZE).sum(-1)
    torch.testing.assert_close(error, squared_errors(weight, codes, scales))
