"""Convolutions beside torch's own, and the same bits however a sequence is cut."""

import pytest
import torch
from torch.nn import functional

from mixchat.kernels.cpu import convolution, rows
from mixchat.kernels.cpu.convolution import Convolution

DTYPES = (torch.float32, torch.bfloat16)
each_form = pytest.mark.parametrize("gated", [False, True], ids=["silu", "gated"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def reference(x, weight, before, gated, bias=None):
    parts = x.double().chunk(3, dim=1) if gated else (None, None, x.double())
    inputs = parts[2] if parts[0] is None else parts[0] * parts[2]
    whole = torch.cat([before.double(), inputs])
    bias = None if bias is None else bias.double()
    out = functional.conv1d(whole.t()[None], weight.double()[:, None], bias, groups=weight.shape[0])
    out = out[0].t()
    return out * parts[1] if gated else functional.silu(out)


def random_case(tokens, channels, taps, dtype, gated):
    x = torch.randn(tokens, (3 if gated else 1) * channels + 16).to(dtype)[:, 8:-8]
    return x, torch.randn(channels, taps), torch.randn(taps - 1, channels)


@each_dtype
@each_form
@pytest.mark.parametrize(("channels", "taps"), [(96, 4), (48, 3), (560, 4), (64, 2)])
def test_sums_are_those_of_torch(form, channels, taps, gated, dtype):
    for tokens in (1, 2, 7, 300):
        x, weight, before = random_case(tokens, channels, taps, dtype, gated)
        after = torch.empty_like(before)
        convolution = Convolution(weight, gated=gated)
        assert convolution.state_shape == before.shape
        result = convolution(x, before, after)
        assert result.dtype == (dtype if gated else torch.float32)
        expected = reference(x, weight, before, gated)
        error = 2**-8 if result.dtype == torch.bfloat16 else 2e-6
        assert ((result - expected).abs() <= error * (expected.abs() + 10)).all()


@each_dtype
@each_form
def test_a_token_has_the_same_bits_however_the_sequence_is_cut(form, gated, dtype):
    x, weight, before = random_case(300, 96, 4, dtype, gated)
    whole, one_by_one = torch.empty_like(before), [before, torch.empty_like(before)]
    convolution = Convolution(weight, gated=gated)
    expected = convolution(x, before, whole)
    for cuts in ([7, 150], [1, 2, 3, 4], [299], range(1, 300)):
        state, pieces = before, []
        for piece in torch.tensor_split(x, list(cuts)):
            after = torch.full_like(before, torch.nan)
            pieces.append(convolution(piece, state, after))
            state = after
        assert torch.equal(torch.cat(pieces), expected)
        assert torch.equal(state, whole)
    assert torch.equal(one_by_one[0], before)


@each_dtype
@each_form
def test_a_bias_is_added_to_the_sums(form, gated, dtype):
    for tokens in (1, 7, 300):
        x, weight, before = random_case(tokens, 96, 4, dtype, gated)
        bias = torch.randn(96) * 10
        result = Convolution(weight, bias, gated=gated)(x, before, torch.empty_like(before))
        expected = reference(x, weight, before, gated, bias)
        error = 2**-8 if result.dtype == torch.bfloat16 else 2e-6
        assert ((result - expected).abs() <= error * (expected.abs() + 20)).all()


def test_threads_do_not_change_bits(monkeypatch):
    if rows.instruction_set() is None:
        pytest.skip("kernels need AVX2 or NEON")
    x, weight, before = random_case(40, 560, 4, torch.bfloat16, False)
    results = []
    for few in (0, 2**30):
        monkeypatch.setattr(convolution, "_FEW", few)
        torch.set_num_threads(3 if few == 0 else 1)
        results.append(Convolution(weight)(x, before, torch.empty_like(before)))
    torch.set_num_threads(1)
    assert torch.equal(*results)
