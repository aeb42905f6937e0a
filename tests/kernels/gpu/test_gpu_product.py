"""Products of a few rows on a GPU, run by Triton's interpreter, beside dense ones in fp64."""

import pytest
import torch
from gpu_matrices import CODED, each_type, stored
from gpu_tools import CARD

from mixchat.kernels.gpu import codes as coded
from mixchat.kernels.gpu import product as kernel
from mixchat.kernels.gpu.product import Form, product, split
from mixchat.weights.matrix.linear import TYPES

# Of one number: sums are fp32, so that they are far better than what bf16 can hold.
_ERROR = 2e-6


def error_of(result: torch.Tensor, expected: torch.Tensor) -> float:
    return ((result - expected).abs().max() / expected.abs().max()).item()


@each_type
@pytest.mark.parametrize(("rows", "columns"), [(64, 576), (128, 64)])
def test_a_product_is_that_of_the_dequantized_matrix(quant_type, rows, columns):
    matrix = stored(quant_type, rows, columns, bias=True)
    x = torch.randn(1, columns).bfloat16()
    sums = product(x, matrix.matrix)
    assert sums.shape == (split(matrix.form).count, 1, rows)
    assert error_of(sums.sum(0), matrix(x)) < _ERROR


@pytest.mark.parametrize(
    ("quant_type", "rows", "columns"),
    [
        # hidden_size and intermediate_size of experts, attention and dense parts of the families.
        ("trellis2", 64, 4096),
        ("nf4", 32, 14336),
        ("mxfp4", 96, 2880),
        ("nf4", 64, 768),
        ("int8", 32, 2048),
        ("trellis3", 64, 1408),
        ("int6", 32, 1536),
        ("none", 24, 5632),
        ("int8", 2880, 64),
    ],
)
def test_matrices_have_the_columns_of_the_families(quant_type, rows, columns):
    matrix, x = stored(quant_type, rows, columns), torch.randn(1, columns).bfloat16()
    assert error_of(product(x, matrix.matrix).sum(0), matrix(x)) < _ERROR


@pytest.mark.skipif(CARD not in (None, "cpu"), reason="a card has the warps that it has")
@pytest.mark.parametrize("quant_type", ["nf4", "mxfp4", "trellis2", "trellis3"])
def test_warps_can_have_64_threads(quant_type, monkeypatch):
    """Levels are in the registers of a warp. AMD's are larger, and hold 64 levels at once."""
    monkeypatch.setattr(coded, "lanes", lambda: 64)
    matrix, x = stored(quant_type, 64, 128), torch.randn(1, 128).bfloat16()
    assert error_of(product(x, matrix.matrix).sum(0), matrix(x)) < _ERROR


@each_type
def test_each_of_several_rows_has_the_bits_that_it_has_alone(quant_type):
    matrix, x = stored(quant_type, 64, 128).matrix, torch.randn(5, 128).bfloat16()
    for count in (2, 5):
        sums = product(x[:count], matrix)
        for row in (0, count - 1):
            assert torch.equal(sums[:, row : row + 1], product(x[row : row + 1], matrix))


@pytest.mark.parametrize("quant_type", ["int8", "int6", "trellis2", "trellis3", "none"])
def test_rows_of_zeros_that_fill_up_the_last_band_are_not_written(quant_type):
    matrix = stored(quant_type, 35, 128, bias=True)
    x = torch.randn(3, 128).bfloat16()
    out = torch.full((split(matrix.form).count, 3, 35), torch.nan)
    assert error_of(product(x, matrix.matrix, out).sum(0), matrix(x)) < _ERROR


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("quant_type", ["nf4", "none"])
def test_x_has_the_type_of_the_model(quant_type, dtype):
    matrix, x = stored(quant_type, 32, 192, dtype), torch.randn(2, 192).to(dtype)
    assert error_of(product(x, matrix.matrix).sum(0), matrix(x)) < _ERROR


@each_type
def test_splits_of_the_columns_add_up_to_the_product(quant_type, monkeypatch):
    """A count of blocks that no split divides, and splits of a different length at the end."""
    columns = 64 * 7
    matrix, x = stored(quant_type, 64, columns), torch.randn(1, columns).bfloat16()
    monkeypatch.setattr(kernel, "_LEAST_STEPS", 1)
    monkeypatch.setattr(kernel, "_THREADS", 64)
    sums = product(x, matrix.matrix)
    assert error_of(sums.sum(0), matrix(x)) < _ERROR


def test_a_small_matrix_is_split_until_a_gpu_is_busy_and_a_large_one_is_not():
    assert split(Form("nf4", 28672, 28672, 4096)).count == 1
    small = split(Form("nf4", 2048, 2048, 4096))
    assert small.count > 1
    assert split(Form("nf4", 2048, 2048, 4096), products=8).count == 1


@pytest.mark.parametrize("quant_type", CODED)
def test_splits_cover_all_columns_once(quant_type):
    block = TYPES[quant_type].blocksize
    for columns in (block, 64 * 3, 576, 704, 768, 1408, 1536, 2048, 2880, 4096, 5120, 14336):
        for rows in (64, 576, 2048, 5120, 151936):
            parts = split(Form(quant_type, rows, rows, columns))
            blocks = columns // block
            assert (parts.count - 1) * parts.blocks < blocks <= parts.count * parts.blocks
