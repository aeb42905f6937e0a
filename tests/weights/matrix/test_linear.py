"""Dense matrices: the ways to multiply them on a CPU."""

import pytest
import torch

from mixchat.weights.matrix import linear
from mixchat.weights.matrix.linear import DenseLinear


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("tokens", [1, 2, 31, 32, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_product_is_right_to_rounding_whichever_way_is_taken(
    native: bool, tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "multiplies_bf16", lambda: native)
    monkeypatch.setattr(linear, "_WIDENED", 1000)  # three rows at a time
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 300, generator=generator).to(dtype)
    x = torch.randn(tokens, 300, generator=generator).to(dtype)
    result = DenseLinear(weight)(x)
    assert result.dtype == dtype
    exact = x.double() @ weight.double().T
    within = {torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float32: 1e-6}[dtype]
    assert (result.double() - exact).norm() < within * exact.norm()


def test_onednn_is_switched_on_again() -> None:
    before = torch._C._get_mkldnn_enabled()
    weight = torch.ones(4, 8, dtype=torch.bfloat16)
    DenseLinear(weight)(torch.ones(1, 8, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError):
        DenseLinear(weight)(torch.ones(1, 9, dtype=torch.bfloat16))
    assert torch._C._get_mkldnn_enabled() == before
