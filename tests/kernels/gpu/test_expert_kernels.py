"""The chosen experts of a token on a GPU, by Triton's interpreter, beside dense ones in fp64."""

import pytest
import torch
from gpu_matrices import each_type, spec_of, stored
from gpu_tools import addresses_of

from mixchat.kernels.cpu.rows import Swiglu
from mixchat.kernels.gpu import experts as kernel
from mixchat.kernels.gpu.experts import experts_down, experts_up
from mixchat.weights.format.expert import ExpertSpec
from mixchat.weights.format.gpu_expert import expert_form
from mixchat.weights.matrix.quant_type import QuantType

CPU = torch.device("cpu")


class Experts:
    """Random experts of one form, each in a block of memory that ends with the last bias."""

    def __init__(
        self,
        up: QuantType,
        down: QuantType,
        width: int,
        inner: int,
        *,
        count: int = 3,
        swiglu: Swiglu | None = None,
        bias: bool = False,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.spec = ExpertSpec(
            spec_of(2 * inner, width, up, dtype, bias=bias),
            spec_of(width, inner, down, dtype, bias=bias),
            swiglu or Swiglu(),
        )
        self.matrices = [
            (
                stored(up, 2 * inner, width, dtype, bias=bias, seed=2 * index),
                stored(down, width, inner, dtype, bias=bias, seed=2 * index + 1),
            )
            for index in range(count)
        ]
        tensors = [[*up.tensors, *down.tensors] for up, down in self.matrices]
        self.blocks = [
            torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in each]) for each in tensors
        ]
        self.form, self.levels = expert_form(self.spec, CPU)

    def __call__(self, x: torch.Tensor, selected: torch.Tensor, weights: torch.Tensor):
        """Return the gated numbers [K, I], and the weighted outputs [K, D], of the kernels."""
        with addresses_of(*self.blocks) as addresses:
            gated = experts_up(x, selected, addresses, self.form, self.levels)
            sums = experts_down(gated, selected, weights, addresses, self.form, self.levels)
        split = self.form.split(len(selected)).count
        return gated, sums.view(len(selected), split, -1).sum(1)

    def expected(self, x: torch.Tensor, expert: int, weight: float) -> tuple[torch.Tensor, ...]:
        up, down = self.matrices[expert]
        gated = self.spec.swiglu._by_torch(*up(x).chunk(2, dim=-1))
        return gated, down(gated.to(x.dtype)) * weight


def assert_near(result: torch.Tensor, expected: torch.Tensor, error: float = 2**-8) -> None:
    assert (result - expected).abs().max() < error * expected.abs().max()


def check(experts: Experts, x: torch.Tensor, chosen: tuple[int, ...]) -> None:
    selected, weights = torch.tensor(chosen, dtype=torch.int32), torch.rand(len(chosen))
    gated, out = experts(x, selected, weights)
    for index, expert in enumerate(chosen):
        expected_gated, expected = experts.expected(x, expert, weights[index].item())
        assert_near(gated[index], expected_gated)
        assert_near(out[index], expected, 2**-6)  # of rounded numbers in between


@each_type
def test_experts_are_found_by_their_addresses(quant_type):
    experts = Experts(quant_type, quant_type, 128, 64)
    assert experts.form.is_supported
    check(experts, torch.randn(128).bfloat16(), (2, 0))


@pytest.mark.parametrize(
    ("up", "down"),
    [("trellis2", "nf4"), ("nf4", "trellis3"), ("mxfp4", "none"), ("none", "int8")],
)
def test_the_matrices_of_an_expert_can_have_two_types(up, down):
    check(Experts(up, down, 64, 64), torch.randn(64).bfloat16(), (1, 2))


def test_gpt_oss_has_biases_and_a_limited_activation():
    for quant_type in ("mxfp4", "none"):
        swiglu = Swiglu(limit=7.0, alpha=1.702)
        experts = Experts(quant_type, quant_type, 96, 96, swiglu=swiglu, bias=True)
        check(experts, torch.randn(96).bfloat16(), (0, 1))


@pytest.mark.parametrize(
    ("dtype", "width", "inner"), [(torch.float16, 72, 40), (torch.float32, 68, 36)]
)
def test_dense_experts_have_any_type_and_count_of_rows(dtype, width, inner):
    experts = Experts("none", "none", width, inner, dtype=dtype, bias=True)
    check(experts, torch.randn(width).to(dtype), (1, 0))


@pytest.mark.parametrize(
    ("up", "down", "width", "inner"),
    [("none", "nf4", 72, 64), ("mxfp4", "trellis3", 96, 64), ("none", "none", 68, 36)],
)
def test_rows_that_fill_up_a_band_are_neither_written_nor_have_a_bias(up, down, width, inner):
    """Without their masks, sums were written past the end, and the bias was read past its own."""
    dtype = torch.float32 if inner % 8 else torch.bfloat16
    experts = Experts(up, down, width, inner, bias=True, dtype=dtype)
    check(experts, torch.randn(width).to(dtype), (2, 0))
    nowhere, selected = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    gated, out = torch.full((1, inner), torch.nan).to(dtype), torch.full((1, width), torch.nan)
    form, levels = experts.form, experts.levels
    experts_up(torch.zeros(width).to(dtype), selected, nowhere, form, levels, gated)
    experts_down(gated, selected, torch.ones(1), nowhere, form, levels, out)
    assert not gated.any()
    assert not out.any()


def test_an_expert_that_lies_elsewhere_gives_zeros():
    """What was in the buffers before is gone, also if it was no number."""
    experts = Experts("nf4", "nf4", 64, 64)
    x, selected = torch.randn(64).bfloat16(), torch.tensor([1, 2], dtype=torch.int32)
    gated = torch.full((2, 64), torch.nan).bfloat16()
    sums = torch.full((2 * experts.form.split(2).count, 64), torch.nan)
    form, levels = experts.form, experts.levels
    with addresses_of(*experts.blocks) as addresses:
        addresses[1] = 0
        experts_up(x, selected, addresses, form, levels, gated)
        experts_down(gated, selected, torch.ones(2), addresses, form, levels, sums)
    assert not gated[0].any()
    assert not sums.view(2, -1)[0].any()
    assert_near(sums.view(2, -1, 64)[1].sum(0), experts.expected(x, 2, 1.0)[1], 2**-6)


def test_splits_of_the_second_matrix_add_its_bias_once(monkeypatch):
    experts = Experts("nf4", "nf4", 64, 320, bias=True)
    monkeypatch.setattr("mixchat.kernels.gpu.product._LEAST_STEPS", 1)
    monkeypatch.setattr("mixchat.kernels.gpu.product._THREADS", 64)
    assert experts.form.split(1).count > 1
    check(experts, torch.randn(64).bfloat16(), (1,))


def test_a_form_that_the_kernels_do_not_take_says_so():
    def form(up: QuantType, inner: int) -> kernel.ExpertForm:
        specs = spec_of(2 * inner, 64, up, torch.bfloat16), spec_of(64, 64, "nf4", torch.bfloat16)
        return expert_form(ExpertSpec(*specs, Swiglu()), CPU).form

    assert form("nf4", 96).is_supported
    assert not form("trellis2", 96).is_supported  # a band would have rows of gate and up
    assert not form("nf4", 48).is_supported
    assert form("none", 48).is_supported
    specs = spec_of(72, 64, "none", torch.bfloat16), spec_of(64, 36, "none", torch.bfloat16)
    assert not expert_form(ExpertSpec(*specs, Swiglu()), CPU).form.is_supported
