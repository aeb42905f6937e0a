"""Each pass over a token's row, against the same in double precision."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm

from mixchat.kernels.cpu import rows
from mixchat.kernels.cpu.compile import instruction_set
from mixchat.kernels.cpu.rows import Swiglu

pytestmark = pytest.mark.skipif(instruction_set() is None, reason="kernels need AVX2")

TOKENS = (1, 3, 300)  # few are done by one thread, many by all
# Of a result's size: one rounding to fp32 or bf16, and what the sums before it gather.
ERROR = {torch.float32: 2e-6, torch.bfloat16: 2**-8}
DTYPES = list(ERROR)
SWIGLUS = [Swiglu(), Swiglu(7.0), Swiglu(2.5, 1.1), Swiglu(act="gelu_pytorch_tanh")]
each_swiglu = pytest.mark.parametrize(
    "swiglu", SWIGLUS, ids=["silu", "limit 7", "limit 2.5", "gelu"]
)


def assert_near(result: torch.Tensor, exact: torch.Tensor) -> None:
    wrong = (result.double() - exact).abs() - ERROR[result.dtype] * (exact.abs() + 0.01)
    assert wrong.max() < 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_is_rounded_as_transformers_rounds_it(dtype):
    for tokens in TOKENS:
        x, weight = torch.randn(tokens, 576).to(dtype), torch.randn(576).to(dtype)
        wide = x.double()
        normed = wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + 1e-5)
        expected = normed.to(dtype) * weight
        result = rows.rms_norm(x, weight, 1e-5)
        assert result.dtype == dtype
        assert (result - expected).abs().max() <= (5e-6 if dtype == torch.float32 else 0.0)


@pytest.mark.parametrize("columns", [256, 2048, 15])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_a_norm_with_weights_in_fp32_is_rounded_once_as_transformers_rounds_it(dtype, columns):
    theirs = Qwen3NextRMSNorm(columns, 1e-6)
    torch.nn.init.normal_(theirs.weight)
    theirs = theirs.to(dtype)
    for tokens in TOKENS:
        x = torch.randn(tokens, columns).to(dtype)
        with torch.inference_mode():
            expected = theirs(x)
            result = rows.rms_norm(x, 1 + theirs.weight.float(), 1e-6)
        assert result.dtype == dtype
        # The sums of squares differ in their last bits, so a number may fall on the other side.
        assert (result != expected).float().mean() < (0.002 if dtype != torch.float32 else 0.9)
        within = 5e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
        torch.testing.assert_close(result, expected, rtol=within, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_are_multiplied_by_gates_in_wider_rows(dtype):
    for tokens, columns in itertools.product(TOKENS, (96, 10)):
        x, around = torch.randn(tokens, columns).to(dtype), torch.randn(tokens, 300).to(dtype)
        gate = around[:, 7 : 7 + columns]
        assert_near(rows.Gating()(x, gate), x.double() * gate.double().sigmoid())
        if columns == 96:
            expected = rows.Gating()(x, gate)
            rows.Gating().step(x, gate, x).run()
            assert torch.equal(x, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_are_multiplied_by_the_softplus_of_gates_in_wider_rows(dtype):
    for tokens, width in itertools.product(TOKENS, (96, 10)):
        x, around = torch.randn(tokens, 5 * width).to(dtype), torch.randn(tokens, 9).to(dtype)
        gating = rows.HeadGating(width)
        gate = 20 * around[:, 2:7]
        factors = torch.nn.functional.softplus(gate.double()).repeat_interleave(width, 1)
        assert_near(gating(x, gate), x.double() * factors)
        if width == 96:
            expected = gating(x, gate)
            gating.step(x, gate, x).run()
            assert torch.equal(x, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [32, 97, 2880, 4096 * 3])
def test_large_numbers_are_capped(dtype, columns):
    for tokens in TOKENS[:2]:
        x = (torch.randn(tokens, columns) * 40).to(dtype)
        x[0, 0] = torch.nan
        result = rows.softcap(x, 30.0)
        assert result[0, 0].isnan()
        error = (result.double() - torch.tanh(x.double() / 30) * 30).view(-1)[1:].abs()
        assert error.max() < (1e-5 if dtype == torch.float32 else 30 * 2**-8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_scaled_in_place(dtype):
    x = torch.randn(3, 64).to(dtype)
    expected = x * 0.37
    rows.Scaling(0.37).step(x, x).run()
    assert torch.equal(x, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_in_the_middle_of_wider_rows_are_normalized_in_place(dtype):
    for tokens, width in itertools.product(TOKENS, (32, 128, 10)):
        around, weight = torch.randn(tokens, 9, width).to(dtype), torch.randn(width).to(dtype)
        expected = around.clone()
        expected[:, 2:7] = rows.rms_norm(around[:, 2:7].reshape(-1, width), weight, 1e-5).view(
            tokens, 5, width
        )
        heads = around[:, 2:7]
        assert rows.rms_norm(heads, weight, 1e-5, out=heads) is heads
        assert torch.equal(around, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_are_clamped_as_torch_clamps_them(dtype):
    x = (torch.randn(3, 64) * 8).to(dtype)
    x[0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    expected = x.clamp(-7.77, 7.77)
    rows.Clamping(7.77).step(x, x).run()
    torch.testing.assert_close(x, expected, rtol=0, atol=0, equal_nan=True)


def test_eps_is_what_keeps_a_row_of_zeros_finite():
    zeros, weight = torch.zeros(1, 64), torch.ones(64)
    assert rows.rms_norm(zeros, weight, 1e-5).abs().max() == 0
    assert rows.rms_norm(zeros, weight, 0.0).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_in_the_middle_of_wider_rows_are_rotated(dtype):
    for tokens in TOKENS:
        whole = torch.randn(tokens, 15, 96).to(dtype)[:, 2:12]
        cos, sin = torch.randn(2, tokens, 64).to(dtype)
        x = whole[..., :64]
        swapped = x.double().roll(32, dims=-1)
        expected = x.double() * cos.double()[:, None] + swapped * sin.double()[:, None]
        scale = ERROR[dtype] * (x.abs() * cos.abs()[:, None] + swapped.abs() * sin.abs()[:, None])
        result = rows.rotate(x.contiguous(), cos, sin)
        assert result.shape == x.shape
        assert ((result.double() - expected).abs() <= scale + 1e-6).all()
        # Of 96 columns, 32 are not rotated.
        assert torch.equal(
            rows.rotate(whole, cos, sin), torch.cat((result, whole[..., 64:]), dim=-1)
        )


def slow_swiglu(swiglu: Swiglu, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    if swiglu.act == "gelu_pytorch_tanh":
        return functional.gelu(gate, approximate="tanh") * up
    if swiglu.limit is None:
        return functional.silu(gate) * up
    gate, up = gate.clamp(max=swiglu.limit), up.clamp(-swiglu.limit, swiglu.limit)
    return (up + 1) * gate * torch.sigmoid(swiglu.alpha * gate)


@each_swiglu
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gate_s_activation_is_multiplied_with_the_other_half(swiglu, dtype):
    for tokens in TOKENS:
        gate_up = (torch.randn(tokens, 2 * 384) * 8).to(dtype)
        gate, up = gate_up.double().chunk(2, dim=-1)
        assert_near(swiglu(gate_up), slow_swiglu(swiglu, gate, up))


@pytest.mark.parametrize("columns", [32, 12])  # 12 are left to torch
def test_a_limit_holds_on_both_sides_of_up_and_above_gate(columns):
    """As in GptOssExperts, whose gate and up alternate."""
    config = SimpleNamespace(
        intermediate_size=1, num_local_experts=1, hidden_size=1, swiglu_alpha=1.702, swiglu_limit=7
    )
    gate_up = torch.tensor([-3e38, -9.0, -7.0, 0.0, 6.9, 7.0, 7.1, 1e30] * 20)[: 2 * columns]
    gate_up = torch.cat((gate_up, gate_up.flip(0)))[None, : 2 * columns]
    interleaved = torch.stack(gate_up.chunk(2, dim=-1), dim=-1).flatten(-2)
    expected = GptOssExperts(config)._apply_gate(interleaved)
    torch.testing.assert_close(Swiglu(7.0)(gate_up), expected, rtol=1e-6, atol=1e-6)


def test_a_gate_far_from_zero_is_closed_or_wide_open():
    gate_up = torch.cat([torch.tensor([-3e38, -200.0, 200.0, 3e38]).repeat(8), torch.ones(32)])
    result = Swiglu()(gate_up[None])[0, :4]
    assert result.tolist() == [0.0, 0.0, 200.0, pytest.approx(3e38)]


@each_swiglu
def test_nan_stays_nan(swiglu):
    assert swiglu(torch.cat([torch.full((1, 32), torch.nan), torch.ones(1, 32)], 1)).isnan().all()
    assert swiglu(torch.cat([torch.ones(1, 32), torch.full((1, 32), torch.nan)], 1)).isnan().all()
    assert rows.rms_norm(torch.full((1, 64), torch.nan), torch.ones(64), 1e-5).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_summed_with_their_weights(dtype):
    for tokens in TOKENS:
        x, weights = torch.rand(tokens, 3, 576).to(dtype), torch.rand(tokens, 3)
        assert_near(
            rows.weighted_sum(x, weights), (x.double() * weights.double()[..., None]).sum(1)
        )


def test_a_row_does_not_depend_on_how_many_others_there_are():
    x, weight = torch.randn(300, 576).bfloat16(), torch.randn(576).bfloat16()
    together = rows.rms_norm(x, weight, 1e-5)
    assert torch.equal(together[7:8], rows.rms_norm(x[7:8], weight, 1e-5))


def test_what_has_no_whole_registers_or_another_type_is_left_to_torch():
    assert rows.can_compute(torch.float32, 64)
    assert not rows.can_compute(torch.float32, 60)
    assert not rows.can_compute(torch.float16, 64)
    assert not rows.can_compute(torch.float32, 64, "meta")


def test_torch_computes_what_the_kernels_do_not_take():
    """Columns that fill no whole registers: the same formulas, in torch."""
    tokens, columns, heads = 5, 12, 3
    x, weight = torch.randn(tokens, columns), torch.randn(columns)
    wide = x.double()
    normed = wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + 1e-5)
    assert_near(rows.rms_norm(x, weight, 1e-5), normed * weight)
    gate, up = wide.chunk(2, dim=-1)
    for swiglu in SWIGLUS:
        assert_near(swiglu(x), slow_swiglu(swiglu, gate, up))
    several, weights = torch.rand(tokens, heads, columns), torch.rand(tokens, heads)
    expected = (several.double() * weights.double()[..., None]).sum(1)
    assert_near(rows.weighted_sum(several, weights), expected)
    cos, sin = torch.rand(2, tokens, columns)
    swapped = several.double().roll(columns // 2, dims=-1)
    rotated = several.double() * cos[:, None] + swapped * sin[:, None]
    assert_near(rows.rotate(several, cos, sin), rotated)
    wide = torch.cat((several, several), dim=-1)
    assert_near(rows.rotate(wide, cos, sin), torch.cat((rotated, several), dim=-1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_copied_from_and_to_parts_of_longer_rows(dtype):
    for tokens in TOKENS:
        source, target = torch.randn(tokens, 96).to(dtype), torch.zeros(tokens, 80, dtype=dtype)
        expected = target.clone()
        expected[:, 16:64] = source[:, 32:80]
        rows.copy_step(source[:, 32:80], target[:, 16:64]).run()
        assert torch.equal(target, expected)
