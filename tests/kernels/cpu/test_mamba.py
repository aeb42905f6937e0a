"""Mamba2's rule beside transformers' forms, and the same bits however a sequence is cut."""

import pytest
import torch
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import (
    GraniteMoeHybridRMSNormGated,
    mamba2_chunk_scan,
    mamba2_selective_state_update,
)

from mixchat.kernels.cpu import rows
from mixchat.kernels.cpu.delta_net import DeltaNetShape, DeltaRule
from mixchat.kernels.cpu.gated_norm import GatedNorm

DTYPES = (torch.float32, torch.bfloat16)
# The heads of groups and of x, and the numbers of a B and of a head's x.
SHAPES = [
    DeltaNetShape(1, 4, 128, 64),
    DeltaNetShape(3, 9, 32, 48),
    DeltaNetShape(5, 5, 64, 16),
]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(params=["kernel", "torch"])
def form(request, monkeypatch):
    """Compute by the kernel, or by torch as on machines without kernels."""
    if request.param == "torch":
        monkeypatch.setattr(rows, "instruction_set", lambda: None)
    elif rows.instruction_set() is None:
        pytest.skip("kernels need AVX2 or NEON")


def random_rule(shape):
    heads = shape.value_heads
    weights = torch.rand(heads).mul(16).log(), torch.randn(heads), torch.randn(heads)
    return DeltaRule(shape, *weights), weights


def random_inputs(shape, tokens, dtype=torch.float32):
    cbx, dt = torch.randn(tokens, shape.channels), torch.randn(tokens, shape.value_heads) * 3
    return cbx, dt.to(dtype), torch.randn(shape.state_shape)


def plain_state(shape, state):
    """Return transformers' states [V, v, k] of the blocks that kernels store."""
    return state.permute(0, 1, 3, 2).reshape(shape.value_heads, shape.value_dim, shape.key_dim)


def by_transformers(shape, weights, cbx, dt, before):
    a_log, dt_bias, skips = weights
    tokens, keys, state = cbx.shape[0], shape.key_heads * shape.key_dim, plain_state(shape, before)
    c, b, x = cbx.split([keys, keys, cbx.shape[1] - 2 * keys], 1)
    inputs = x.view(1, tokens, shape.value_heads, -1), dt[None], -a_log.exp()
    groups = [part.reshape(1, tokens, shape.key_heads, -1) for part in (b, c)]
    options = {"dt_bias": dt_bias, "dt_softplus": True}
    if tokens > 1:
        states = {"initial_states": state[None], "return_final_states": True, "chunk_size": 16}
        out, state = mamba2_chunk_scan(*inputs, *groups, D=skips, **options, **states)
    else:
        state, width = state[None].clone(), shape.value_dim
        values, steps, rates = inputs[0][0], dt[..., None].expand(-1, -1, width), inputs[2]
        rates = rates[:, None, None].expand(-1, width, shape.key_dim)
        options["dt_bias"] = dt_bias[:, None].expand(-1, width)
        options["D"] = skips[:, None].expand(-1, width)
        own = (part[:, 0] for part in groups)
        out = mamba2_selective_state_update(state, values, steps, rates, *own, **options)
    return out.reshape(tokens, -1), state[0]


@each_shape
def test_states_and_outputs_are_those_of_transformers(form, shape):
    for seed, tokens in enumerate((1, 7, 300)):
        torch.manual_seed(seed)
        (rule, weights), (cbx, dt, before) = random_rule(shape), random_inputs(shape, tokens)
        expected, expected_state = by_transformers(shape, weights, cbx, dt, before)
        kept, after = before.clone(), torch.full_like(before, torch.nan)
        result = rule(cbx.clone(), dt, before, after)
        assert torch.equal(before, kept)
        assert (result - expected).abs().max() < 2e-5 * expected.abs().max()
        state = plain_state(shape, after)
        assert (state - expected_state).abs().max() < 2e-5 * expected_state.abs().max()


@each_dtype
@each_shape
def test_a_token_has_the_same_bits_however_the_sequence_is_cut(form, shape, dtype):
    rule, (cbx, dt, before) = random_rule(shape)[0], random_inputs(shape, 60, dtype)
    whole = torch.empty_like(before)
    expected = rule(cbx.clone(), dt, before, whole)
    assert expected.dtype == dtype
    for cuts in ([7], [1, 2, 30], [59], range(1, 60)):
        state, pieces = before, []
        parts = (torch.tensor_split(tensor, list(cuts)) for tensor in (cbx, dt))
        for inputs, steps in zip(*parts, strict=True):
            after = torch.full_like(before, torch.nan)
            pieces.append(rule(inputs.clone(), steps, state, after))
            state = after
        assert torch.equal(torch.cat(pieces), expected)
        assert torch.equal(state, whole)


@each_dtype
def test_the_norm_after_the_gate_is_that_of_transformers(form, dtype):
    for tokens, groups, width in ((1, 1, 128), (7, 5, 48), (300, 2, 32)):
        x = torch.randn(tokens, groups * width).to(dtype)
        gate = (torch.randn(tokens, groups * width + 32) * 3).to(dtype)[:, 16:-16]
        norm = GraniteMoeHybridRMSNormGated(groups * width, width, eps=1e-6).to(dtype)
        norm.weight.data = torch.randn(groups * width).to(dtype)
        expected = norm(x, gate).detach()
        result = GatedNorm(norm.weight.data, 1e-6, groups)(x, gate)
        assert result.dtype == dtype
        error = 2e-6 if dtype == torch.float32 else 2**-7
        assert ((result - expected).abs() <= error * expected.abs() + 1e-7).all()
