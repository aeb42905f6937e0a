"""A matrix of few rows on a GPU, run by Triton's interpreter, beside torch."""

import pytest
import torch

from mixchat.kernels.gpu.dense import dense_product


@pytest.mark.parametrize(("rows", "columns"), [(1, 5), (48, 2048), (6, 2880)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_that_of_torch(rows, columns, dtype):
    x = torch.randn(columns).to(dtype)
    weight = torch.randn(rows, columns).to(dtype)
    out = torch.full((rows,), torch.nan, dtype=dtype)
    dense_product(x, weight, out)
    expected = weight.double() @ x.double()
    within = {torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype] * columns**0.5
    assert (out.double() - expected).abs().max() < within
