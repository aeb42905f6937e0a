"""NF4 against bitsandbytes."""

from dataclasses import replace

import bitsandbytes.functional as bnb
import pytest
import torch
from matrix_tools import random_weight

from mixchat.weights.matrix import nf4
from mixchat.weights.matrix.linear import LinearSpec
from mixchat.weights.matrix.nf4 import NF4, Quantized4bit, round_absmax


def dequantized(weight: torch.Tensor) -> torch.Tensor:
    """The oracle: bitsandbytes there and back, in fp32; as one row, which it always reads right."""
    codes, state = bnb.quantize_4bit(weight.view(1, -1), blocksize=64, quant_type="nf4")
    state.dtype = torch.float32
    return bnb.dequantize_4bit(codes, state).view(weight.shape)


def test_the_levels_are_those_of_bitsandbytes():
    assert torch.equal(NF4.levels, bnb.get_4bit_type("nf4", device="cpu"))


@pytest.mark.parametrize(("rows", "columns"), [(32, 64), (96, 192), (64, 1536)])
def test_the_order_of_codes_is_that_of_bitsandbytes_on_cpus(rows, columns):
    """The only use of its private converter: our own must give the same bytes."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    weight = random_weight(rows, columns)
    _, packed = NF4.pack(*NF4.codes(weight), columns)
    codes, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    expected, _ = _convert_weight_packed_for_cpu(codes, state)
    assert torch.equal(packed, expected.view(-1))


@pytest.mark.parametrize("columns", [128, 96, 66])
def test_a_matrix_of_bitsandbytes_is_dequantized_as_there(columns, monkeypatch):
    weight = random_weight(40, columns)
    monkeypatch.setattr(nf4, "_DENSE_PIECE", 256)
    expected = dequantized(weight)
    assert torch.equal(part(weight).dense(torch.float32), expected)
    assert torch.equal(part(weight).dense(torch.bfloat16), expected.bfloat16())


def test_rounding_a_scale_changes_it_by_one_part_in_256_at_most():
    scales = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) * 3 + 1e-3
    change = (round_absmax(scales).float() - scales).abs()
    assert (change <= scales / 256).all()
    assert torch.equal(round_absmax(scales.bfloat16().float()), scales.bfloat16())


def spec(rows: int = 64, columns: int = 128) -> LinearSpec:
    return LinearSpec("w", rows, columns, "nf4", torch.bfloat16)


def part(weight: torch.Tensor, *, nested: bool = False) -> Quantized4bit:
    """A matrix as bitsandbytes has quantized it."""
    codes, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
    absmax = state.absmax
    if nested:
        absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
    return Quantized4bit(NF4, *weight.shape, codes.view(-1), absmax)


@pytest.mark.parametrize("heights", [[32, 48, 16], [24, 7, 9]])
def test_taking_over_matrices_gives_what_encoding_the_whole_gives(heights):
    weight = random_weight(sum(heights), 128)
    linear = spec(len(weight))
    parts = [part(rows) for rows in weight.split(heights)]
    taken = linear.stack_quantized(parts)
    assert [tensor.dtype for tensor in taken] == [torch.bfloat16, torch.uint8]
    for one, other in zip(taken, linear.encode(weight), strict=True):
        assert torch.equal(one, other)


def test_a_nested_absmax_is_taken_over_to_bf16_rounding():
    weight = random_weight(64, 128)
    one = part(weight, nested=True)
    linear = replace(spec(), dtype=torch.float32)
    absmax, codes = linear.stack_quantized([one])
    plain = linear.encode(weight)
    assert torch.equal(codes, plain[1])
    assert torch.equal(absmax.view(2, 2, 32).transpose(1, 2).reshape(-1), one.absmax.bfloat16())
