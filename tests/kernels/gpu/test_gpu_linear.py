"""Matrices on a GPU as linear maps, run by Triton's interpreter, beside the CPU's."""

import pytest
import torch
from gpu_matrices import CODED, each_type, spec_of, stored

from mixchat.kernels.gpu.dequantize import dequantize
from mixchat.weights.matrix import gpu_linear
from mixchat.weights.matrix.gpu_linear import build_on_gpu


@pytest.mark.parametrize("quant_type", CODED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_matrix_is_dequantized_to_the_numbers_of_the_cpu(quant_type, dtype):
    matrix = stored(quant_type, 64, 192)
    out = torch.full((64, 192), torch.nan, dtype=dtype)
    dequantize(matrix.matrix, out)
    difference = (out - matrix.dense).abs()
    assert (difference <= matrix.dense.abs() * (2**-8 if dtype == torch.bfloat16 else 1e-6)).all()


@pytest.mark.parametrize("quant_type", ["nf4", "int6", "trellis2"])
def test_some_rows_are_dequantized_and_what_follows_stays(quant_type):
    matrix = stored(quant_type, 160, 64)
    out = torch.full((100, 64), torch.nan)
    dequantize(matrix.matrix, out, 64)
    assert torch.allclose(out[:96].double(), matrix.dense[64:160], rtol=1e-5)
    assert out[96:].isnan().all()


@each_type
@pytest.mark.parametrize("tokens", [3, 20])
def test_a_map_of_few_or_many_rows_is_that_of_the_cpu(quant_type, tokens, monkeypatch):
    monkeypatch.setattr(gpu_linear, "_PIECE", 64 * 64)
    matrix = stored(quant_type, 128, 64, bias=True)
    linear = build_on_gpu(matrix.spec, matrix.tensors)
    assert linear is not None
    x = torch.randn(tokens, 64).bfloat16()
    result, expected = linear(x), matrix(x)
    assert (result.dtype, result.shape) == (torch.bfloat16, (tokens, 128))
    assert (result - expected).abs().max() < 2**-7 * expected.abs().max()
    assert linear(x.view(1, tokens, 64)).shape == (1, tokens, 128)


def test_an_exact_map_gives_a_row_the_same_bits_among_many():
    matrix = stored("nf4", 32, 64)
    linear, x = build_on_gpu(matrix.spec, matrix.tensors), torch.randn(11, 64).bfloat16()
    assert linear is not None
    assert torch.equal(linear(x, exact=True)[10], linear(x[10]))


def test_the_rows_of_zeros_of_a_head_are_no_part_of_the_result():
    matrix = stored("int8", 70, 64)
    linear = build_on_gpu(matrix.spec, matrix.tensors)
    assert linear is not None
    for tokens in (2, 20):
        assert linear(torch.randn(tokens, 64).bfloat16()).shape == (tokens, 70)


def test_a_matrix_without_whole_blocks_is_left_to_others():
    spec = spec_of(32, 60, "none", torch.bfloat16)
    assert build_on_gpu(spec, [torch.zeros(32, 60).bfloat16()]) is None
