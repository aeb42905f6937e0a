"""`gated_convolution` beside the CPU's."""

import pytest
import torch
from gpu_tools import addresses_of

from mixchat.kernels.cpu.convolution import Convolution
from mixchat.kernels.gpu.convolution import gated_convolution


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("channels", "taps", "splits"), [(200, 3, 1), (64, 4, 9), (128, 2, 3)])
def test_tokens_after_each_other_are_those_of_a_cpu(dtype, channels, taps, splits):
    convolution = Convolution(torch.randn(channels, taps).to(dtype), gated=True)
    states = [torch.randn(convolution.state_shape), torch.zeros(convolution.state_shape)]
    kept, out = states[0].clone(), torch.empty(channels).to(dtype)
    for token in range(taps + 1):
        projected = torch.randn(splits, 3 * channels) / splits**0.5
        old, new = states[token % 2], states[1 - token % 2]
        with addresses_of(old, new) as addresses:
            gated_convolution(projected, convolution.weight, addresses, out)

        after = torch.empty_like(kept)
        expected = convolution(projected.sum(0).to(dtype)[None], kept, after)[0]
        kept = after
        within = {torch.bfloat16: 2**-6, torch.float16: 2**-8, torch.float32: 1e-5}[dtype]
        torch.testing.assert_close(new, kept, rtol=within, atol=within)
        torch.testing.assert_close(out, expected, rtol=within, atol=within)
