"""`delta_net` beside the parts of a Gated DeltaNet on a CPU."""

import pytest
import torch
from gpu_tools import addresses_of

from mixchat.kernels.cpu.convolution import Convolution
from mixchat.kernels.cpu.delta_net import DeltaNetShape, DeltaRule
from mixchat.kernels.cpu.dense import dense_matmul
from mixchat.kernels.cpu.gated_norm import GatedNorm
from mixchat.kernels.gpu.delta_net import DeltaNetWeights, delta_net, delta_rule

EPS = 1e-5


@pytest.mark.parametrize(
    ("shape", "size", "taps", "splits", "dtype"),
    [
        (DeltaNetShape(1, 2, 128, 128), 256, 4, 1, torch.bfloat16),
        (DeltaNetShape(3, 9, 32, 64), 64, 4, 1, torch.float32),
        (DeltaNetShape(2, 2, 24, 48), 80, 3, 5, torch.float16),
        (DeltaNetShape(1, 3, 16, 16), 96, 2, 9, torch.bfloat16),
    ],
)
def test_tokens_after_each_other_are_those_of_a_cpu(shape, size, taps, splits, dtype):
    values = shape.value_heads * shape.value_dim
    ba_proj = torch.randn(2 * shape.value_heads, size).to(dtype) / size**0.5
    convolution = Convolution(torch.randn(shape.channels, taps).to(dtype))
    rates = torch.rand(shape.value_heads).mul(16).log(), torch.randn(shape.value_heads)
    rule = DeltaRule(shape, *rates)
    norm = GatedNorm(torch.randn(shape.value_dim).to(dtype), EPS)
    small = ba_proj, convolution.weight, rule.rates, rule.biases, norm.weight
    weights = DeltaNetWeights(*small, EPS)
    conv = [torch.randn(taps - 1, shape.channels), torch.zeros(taps - 1, shape.channels)]
    state = [torch.randn(shape.state_shape), torch.zeros(shape.state_shape)]
    expected_conv, expected_state = conv[0].clone(), state[0].clone()
    counters = torch.zeros(shape.value_heads, dtype=torch.int32)
    read, out = torch.empty(values).to(dtype), torch.empty(values).to(dtype)
    for token in range(3):
        x = torch.randn(size).to(dtype)
        projected = torch.randn(splits, shape.channels + values) / splits**0.5
        old, new = token % 2, 1 - token % 2
        with addresses_of(conv[old], conv[new], state[old], state[new]) as addresses:
            kept = addresses, shape.state_shape
            delta_net(x, projected, weights, *kept, read, out, counters)

        row = projected.sum(0).to(dtype)[None]
        after_conv, after_state = torch.empty_like(conv[0]), torch.empty_like(state[0])
        qkv = convolution(row[:, : shape.channels], expected_conv, after_conv)
        ba = dense_matmul(x[None], ba_proj)
        values_read = rule(qkv, ba, expected_state, after_state)
        expected = norm(values_read, row[:, shape.channels :])[0]
        expected_conv, expected_state = after_conv, after_state

        within = {torch.bfloat16: 2**-6, torch.float16: 2**-7, torch.float32: 1e-4}[dtype]
        torch.testing.assert_close(conv[new], expected_conv, rtol=within, atol=within)
        torch.testing.assert_close(state[new], expected_state, rtol=within, atol=within)
        torch.testing.assert_close(out, expected, rtol=within, atol=within)
        assert not counters.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 17])
@pytest.mark.parametrize(
    "shape",
    [DeltaNetShape(1, 2, 128, 64), DeltaNetShape(3, 6, 24, 48), DeltaNetShape(2, 2, 16, 16)],
)
def test_a_prompt_s_tokens_are_those_of_a_cpu(shape, tokens, dtype):
    rule = DeltaRule(shape, torch.rand(shape.value_heads), torch.randn(shape.value_heads))
    rows, ba = torch.randn(tokens, shape.channels + 8), torch.randn(tokens, 2 * shape.value_heads)
    ba, before = ba.to(dtype), torch.randn(shape.state_shape)
    after, expected_after = torch.empty_like(before), torch.empty_like(before)
    expected = rule(rows[:, : shape.channels].clone(), ba, before, expected_after)
    qkv = rows[:, : shape.channels]  # rows of a matrix
    out = delta_rule(qkv, rule.prepare(qkv, ba), before, after, dtype)
    within = {torch.bfloat16: 2**-7, torch.float32: 1e-4}[dtype]
    torch.testing.assert_close(out, expected, rtol=within, atol=within)
    torch.testing.assert_close(after, expected_after, rtol=1e-4, atol=1e-4)
