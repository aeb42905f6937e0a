"""NF4 and FP4 against bitsandbytes."""

import bitsandbytes.functional as bnb
import pytest
import torch

from mixchat.base.errors import CheckpointError
from mixchat.weights.matrix.linear import Layout, LinearSpec
from mixchat.weights.matrix.nf4 import FOUR_BIT, FP4, NF4, FourBit, Quantized4bit, round_absmax
from mixchat.weights.matrix.quant_type import absmax_size

each_type = pytest.mark.parametrize("kind", [NF4, FP4], ids=["nf4", "fp4"])


def random_weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).to(torch.bfloat16)


def dequantized(weight: torch.Tensor, kind: str = "nf4") -> torch.Tensor:
    """The oracle: bitsandbytes there and back, in fp32; as one row, which it always reads right."""
    codes, state = bnb.quantize_4bit(weight.view(1, -1), blocksize=64, quant_type=kind)
    state.dtype = torch.float32
    return bnb.dequantize_4bit(codes, state).view(weight.shape)


@each_type
def test_the_levels_are_those_of_bitsandbytes(kind):
    assert torch.equal(kind.levels, bnb.get_4bit_type(kind.name, device="cpu"))


@each_type
def test_codes_and_scales_are_those_of_bitsandbytes(kind):
    weight = random_weight(96, 128)
    expected, state = bnb.quantize_4bit(weight, blocksize=64, quant_type=kind.name)
    codes, absmax = kind.codes(weight)
    assert torch.equal(codes, expected.view(-1))
    # Exactly, not nearly: the largest of 64 bf16 numbers is a bf16 number.
    assert torch.equal(absmax.float(), state.absmax)


@pytest.mark.parametrize(("rows", "columns"), [(5, 6), (3, 66), (1, 2), (7, 130), (5, 16), (8, 96)])
def test_odd_shapes_are_handled_as_bitsandbytes_does(rows, columns):
    weight = random_weight(rows, columns)
    codes, absmax = NF4.codes(weight)
    assert codes.shape == (NF4.codes_size(rows, columns),)
    assert absmax.shape == (absmax_size(rows, columns),)
    result = NF4.dequantize(codes, absmax, (rows, columns), torch.float32)
    assert torch.equal(result, dequantized(weight))


@pytest.mark.parametrize(("rows", "columns"), [(32, 64), (96, 192), (64, 1536)])
def test_the_packed_layout_is_that_of_bitsandbytes(rows, columns):
    """The only use of its private converter: our own must give the same bytes."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    weight = random_weight(rows, columns)
    packed, scales = NF4.to_packed_layout(*NF4.codes(weight), rows, columns)
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    expected, state = _convert_weight_packed_for_cpu(codes, state)
    assert torch.equal(packed, expected.view(-1))
    assert torch.equal(scales.view(state.absmax.shape), state.absmax)


def test_a_code_lies_where_the_layout_says():
    """Row 3, column 10 is code 2 * 3 + 0 of line 5: low nibble of byte 6 of that line."""
    rows, columns = 32, 64
    codes = torch.zeros(rows * columns // 2, dtype=torch.uint8)
    codes[(3 * columns + 10) // 2] = 0xF0  # an even column is the high nibble
    packed, _ = NF4.to_packed_layout(codes, torch.ones(32, dtype=torch.bfloat16), rows, columns)
    assert packed.nonzero().tolist() == [[5 * 32 + 6]]
    assert packed[5 * 32 + 6] == 0x0F


@each_type
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("columns", [192, 16, 96, 66, 7])
def test_the_portable_matmul_is_exact_in_fp32(tokens, columns, kind):
    weight, x = random_weight(40, columns), random_weight(tokens, columns, seed=1).float()
    codes, absmax = kind.codes(weight)
    result = kind.matmul(x, codes, absmax, (40, columns))
    torch.testing.assert_close(result, x @ dequantized(weight, kind.name).T, rtol=1e-5, atol=1e-4)


@each_type
@pytest.mark.parametrize("columns", [128, 96, 66])
def test_dequantizing_is_that_of_bitsandbytes(kind, columns):
    weight = random_weight(40, columns)
    codes, absmax = kind.codes(weight)
    result = kind.dequantize(codes, absmax, (40, columns), torch.float32)
    assert torch.equal(result, dequantized(weight, kind.name))


def test_rounding_a_scale_changes_it_by_one_part_in_256_at_most():
    scales = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) * 3 + 1e-3
    change = (round_absmax(scales).float() - scales).abs()
    assert (change <= scales / 256).all()
    assert torch.equal(round_absmax(scales.bfloat16().float()), scales.bfloat16())


def spec(layout: Layout, rows: int = 64, columns: int = 128, kind: FourBit = "nf4") -> LinearSpec:
    return LinearSpec("w", rows, columns, kind, layout, torch.bfloat16)


def part(weight: torch.Tensor, kind: FourBit = "nf4", *, nested: bool = False) -> Quantized4bit:
    """A matrix as bitsandbytes has quantized it."""
    codes, state = bnb.quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
    absmax = state.absmax
    if nested:
        absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
    return Quantized4bit(FOUR_BIT[kind], *weight.shape, codes.view(-1), absmax)


@each_type
@pytest.mark.parametrize("layout", ["bitsandbytes", "cpu-packed"])
def test_taking_over_matrices_gives_what_encoding_the_whole_gives(kind, layout):
    weight = random_weight(96, 128)
    linear = spec(layout, rows=96, kind=kind.name)
    parts = [part(rows, kind.name) for rows in weight.split([32, 48, 16])]
    taken = linear.stack_quantized(parts)
    assert [tensor.dtype for tensor in taken] == [torch.bfloat16, torch.uint8]
    for one, other in zip(taken, linear.encode(weight), strict=True):
        assert torch.equal(one, other)


@each_type
def test_a_nested_absmax_is_taken_over_to_bf16_rounding(kind):
    weight = random_weight(64, 128)
    one = part(weight, kind.name, nested=True)
    linear = spec("bitsandbytes", kind=kind.name)
    absmax, codes = linear.stack_quantized([one])
    assert torch.equal(codes, one.codes)
    assert torch.equal(absmax, one.absmax.bfloat16())
    x = random_weight(5, 128, seed=1).float()
    expected = x @ kind.dequantize(codes, absmax, (64, 128), torch.float32).T
    torch.testing.assert_close(linear.build([absmax, codes])(x), expected, rtol=1e-5, atol=1e-4)


def test_a_part_must_end_with_a_whole_block_where_another_follows():
    whole, broken = part(random_weight(2, 96)), part(random_weight(1, 96))
    linear = spec("bitsandbytes", rows=3, columns=96)
    absmax, codes = linear.stack_quantized([whole, broken])
    assert (absmax.shape, codes.shape) == ((5,), (144,))
    with pytest.raises(CheckpointError, match=r"^w: a part of it does not end with a whole block"):
        linear.stack_quantized([broken, whole])
