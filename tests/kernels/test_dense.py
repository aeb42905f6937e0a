"""The dense product that computes each token alike, however many are computed with it."""

import pytest
import torch

from mixchat.kernels import dense
from mixchat.kernels.compile import InstructionSet, instruction_set, kernels_available

pytestmark = pytest.mark.skipif(not kernels_available(), reason="the kernel needs AVX2")


@pytest.fixture(params=["avx512", "avx2"])
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> InstructionSet:
    if request.param == "avx512" and instruction_set() != "avx512":
        pytest.skip("the CPU has no AVX-512")
    monkeypatch.setattr(dense, "instruction_set", lambda: request.param)
    return request.param


def random(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, columns, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 16), (7, 32), (50, 304), (200, 4096)])
@pytest.mark.parametrize("tokens", [1, 2, 3, 40])
def test_the_product_is_right_to_rounding(
    instructions: InstructionSet, dtype: torch.dtype, shape: tuple[int, int], tokens: int
) -> None:
    weight, x = random(*shape, dtype), random(tokens, shape[1], dtype)
    result = dense.exact_matmul(x, weight)
    assert (result.dtype, result.shape) == (dtype, (tokens, shape[0]))
    exact = x.double() @ weight.double().T
    within = 2**-8 if dtype == torch.bfloat16 else 1e-6
    assert (result.double() - exact).norm() <= within * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_token_has_the_same_bits_alone_and_among_others(
    instructions: InstructionSet, dtype: torch.dtype
) -> None:
    weight, x = random(77, 576, dtype), random(300, 576, dtype)
    together = dense.exact_matmul(x, weight)
    alone = torch.cat([dense.exact_matmul(row[None], weight) for row in x])
    assert torch.equal(together, alone)
    assert torch.equal(dense.exact_matmul(x[5:9], weight), together[5:9])


def test_what_is_no_number_stays_with_its_token(instructions: InstructionSet) -> None:
    weight, x = random(8, 32, torch.float32), random(5, 32, torch.float32)
    x[2, 3] = float("nan")
    finite = dense.exact_matmul(x, weight).isfinite().all(dim=-1)
    assert finite.tolist() == [True, True, False, True, True]


def test_other_types_and_odd_widths_are_left_to_torch() -> None:
    assert not dense.can_multiply(torch.ones(1, 20), torch.ones(4, 20))
    assert not dense.can_multiply(torch.ones(1, 32).half(), torch.ones(4, 32).half())
    assert not dense.can_multiply(torch.ones(1, 32), torch.ones(4, 32).bfloat16())
    assert dense.can_multiply(torch.ones(1, 64), torch.ones(4, 64))
    assert not dense.can_multiply(torch.ones(1, 32), torch.ones(4, 64))
