"""Dense products: by torch, and by the kernel that computes each token alike."""

import itertools

import pytest
import torch

from mixchat.kernels.cpu import dense


def random(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, columns, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_product_is_right_to_rounding(instructions, dtype):
    shapes = [(1, 16), (7, 32), (50, 304), (200, 4096)]
    for shape, tokens in itertools.product(shapes, (1, 2, 3, 40)):
        weight, x = random(*shape, dtype), random(tokens, shape[1], dtype)
        result = dense.exact_matmul(x, weight)
        assert (result.dtype, result.shape) == (dtype, (tokens, shape[0]))
        exact = x.double() @ weight.double().T
        within = 2**-8 if dtype == torch.bfloat16 else 1e-6
        assert (result.double() - exact).norm() <= within * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_token_has_the_same_bits_alone_and_among_others(instructions, dtype):
    weight, x = random(77, 576, dtype), random(300, 576, dtype)
    together = dense.exact_matmul(x, weight)
    alone = torch.cat([dense.exact_matmul(row[None], weight) for row in x])
    assert torch.equal(together, alone)
    assert torch.equal(dense.exact_matmul(x[5:9], weight), together[5:9])


def test_what_is_no_number_stays_with_its_token(instructions):
    weight, x = random(8, 32, torch.float32), random(5, 32, torch.float32)
    x[2, 3] = float("nan")
    finite = dense.exact_matmul(x, weight).isfinite().all(dim=-1)
    assert finite.tolist() == [True, True, False, True, True]


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (torch.ones(3, 20), torch.ones(4, 20)),
        (torch.ones(3, 32).half(), torch.ones(4, 32).half()),
    ],
)
def test_other_types_and_odd_widths_are_left_to_torch(x, weight, monkeypatch):
    monkeypatch.setattr(dense, "exact_matmul", None)
    assert torch.equal(dense.dense_matmul(x, weight, exact=True), x @ weight.T)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_product_is_right_to_rounding_whichever_way_is_taken(native, dtype, monkeypatch):
    monkeypatch.setattr(dense, "multiplies_bf16", lambda: native)
    monkeypatch.setattr(dense, "_WIDENED", 1000)  # three rows at a time
    weight = random(50, 300, dtype)
    for tokens in (1, 2, 31, 32, 100):
        x = random(tokens, 300, dtype)
        result = dense.dense_matmul(x, weight)
        assert result.dtype == dtype
        exact = x.double() @ weight.double().T
        within = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 1e-6}[dtype]
        assert (result.double() - exact).norm() < within * exact.norm()


def test_onednn_is_switched_on_again():
    before = torch._C._get_mkldnn_enabled()
    weight = torch.ones(4, 8, dtype=torch.bfloat16)
    dense.dense_matmul(torch.ones(1, 8, dtype=torch.bfloat16), weight)
    with pytest.raises(RuntimeError):
        dense.dense_matmul(torch.ones(1, 9, dtype=torch.bfloat16), weight)
    assert torch._C._get_mkldnn_enabled() == before
