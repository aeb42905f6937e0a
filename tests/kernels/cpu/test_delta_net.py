"""Gated DeltaNet beside transformers' forms, and the same bits however a sequence is cut."""

from typing import NamedTuple

import pytest
import torch
from torch.nn import functional
from transformers.models.qwen3_next.modeling_qwen3_next import (
    Qwen3NextRMSNormGated,
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

from mixchat.kernels.cpu import rows
from mixchat.kernels.cpu.delta_net import DeltaNetShape, DeltaRule
from mixchat.kernels.cpu.gated_norm import GatedNorm

DTYPES = (torch.float32, torch.bfloat16)
SHAPES = [
    DeltaNetShape(2, 4, 128, 128),
    DeltaNetShape(3, 9, 32, 48),
    DeltaNetShape(5, 5, 64, 16),
    DeltaNetShape(1, 3, 16, 160),
]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(params=["kernel", "torch"])
def form(request, monkeypatch):
    """Compute by the kernel, or by torch as on machines without kernels."""
    if request.param == "torch":
        monkeypatch.setattr(rows, "instruction_set", lambda: None)
    elif rows.instruction_set() is None:
        pytest.skip("kernels need AVX2 or NEON")


class Case(NamedTuple):
    rule: DeltaRule
    qkv: torch.Tensor
    ba: torch.Tensor
    before: torch.Tensor
    a_log: torch.Tensor
    dt_bias: torch.Tensor


def random_case(shape, tokens, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    a_log, dt_bias = torch.rand(shape.value_heads).mul(16).log(), torch.randn(shape.value_heads)
    qkv, ba = torch.randn(tokens, shape.channels), torch.randn(tokens, 2 * shape.value_heads) * 3
    state = torch.randn(shape.state_shape)
    return Case(DeltaRule(shape, a_log, dt_bias), qkv, ba.to(dtype), state, a_log, dt_bias)


def plain_state(shape, state):
    """Return states [V, k, v] of the blocks that kernels store."""
    return state.transpose(1, 2).reshape(shape.value_heads, shape.key_dim, shape.value_dim)


def by_transformers(shape, case, function):
    tokens, keys = case.qkv.shape[0], shape.key_heads * shape.key_dim
    queries, keys, values = case.qkv.double().split([keys, keys, case.qkv.shape[1] - 2 * keys], 1)
    beta, alpha = case.ba.double().chunk(2, dim=1)
    decay = -case.a_log.exp() * functional.softplus(alpha + case.dt_bias)
    out, state = function(
        queries.view(1, tokens, shape.key_heads, shape.key_dim),
        keys.view(1, tokens, shape.key_heads, shape.key_dim),
        values.view(1, tokens, shape.value_heads, shape.value_dim),
        g=decay[None],
        beta=beta.sigmoid()[None],
        initial_state=plain_state(shape, case.before)[None],
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    return out.reshape(tokens, -1), state[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "function", [torch_recurrent_gated_delta_rule, torch_chunk_gated_delta_rule]
)
def test_states_and_outputs_are_those_of_transformers(form, shape, function):
    for seed, tokens in enumerate((1, 7, 300)):
        case = random_case(shape, tokens, seed=seed)
        expected, expected_state = by_transformers(shape, case, function)
        after = torch.full_like(case.before, torch.nan)
        kept = case.before.clone()
        result = case.rule(case.qkv.clone(), case.ba, case.before, after)
        assert torch.equal(case.before, kept)
        # transformers computes in fp32, too.
        assert (result - expected).abs().max() < 5e-5 * expected.abs().max()
        state = plain_state(shape, after)
        assert (state - expected_state).abs().max() < 5e-5 * expected_state.abs().max()


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_token_has_the_same_bits_however_the_sequence_is_cut(form, shape, dtype):
    case = random_case(shape, 60, dtype)
    whole = torch.empty_like(case.before)
    expected = case.rule(case.qkv.clone(), case.ba, case.before, whole)
    assert expected.dtype == dtype
    for cuts in ([7], [1, 2, 30], [59], range(1, 60)):
        state, pieces = case.before, []
        parts = (torch.tensor_split(tensor, list(cuts)) for tensor in (case.qkv, case.ba))
        for qkv, ba in zip(*parts, strict=True):
            after = torch.full_like(case.before, torch.nan)
            pieces.append(case.rule(qkv.clone(), ba, state, after))
            state = after
        assert torch.equal(torch.cat(pieces), expected)
        assert torch.equal(state, whole)


def test_threads_do_not_change_bits():
    case = random_case(SHAPES[1], 50, torch.bfloat16)
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        after = torch.empty_like(case.before)
        results.append((case.rule(case.qkv.clone(), case.ba, case.before, after), after))
    torch.set_num_threads(1)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("alpha", [-90.0, -20.0, 0.0, 20.0, 90.0])
def test_extreme_decays_are_those_of_torch(form, alpha):
    shape = SHAPES[2]
    case = random_case(shape, 1)
    case.ba[:, shape.value_heads :] = alpha
    case.qkv[:, 2 * shape.key_heads * shape.key_dim :] = 0
    expected, _ = by_transformers(shape, case, torch_recurrent_gated_delta_rule)
    result = case.rule(case.qkv.clone(), case.ba, case.before, torch.empty_like(case.before))
    assert (result - expected).abs().max() <= 2e-6 * case.before.abs().max()


@each_dtype
def test_the_gated_norm_rounds_where_transformers_does(form, dtype):
    for tokens, heads, width in ((1, 3, 128), (7, 5, 48), (300, 2, 32)):
        x = torch.randn(tokens, heads * width).to(dtype)
        gate = (torch.randn(tokens, heads * width + 32) * 3).to(dtype)[:, 16:-16]
        norm = Qwen3NextRMSNormGated(width, eps=1e-6).to(dtype)
        norm.weight.data = torch.randn(width).to(dtype)
        expected = norm(x.view(-1, width), gate.reshape(-1, width)).view(x.shape).detach()
        result = GatedNorm(norm.weight.data, 1e-6)(x, gate)
        assert result.dtype == dtype
        # The kernel's silu differs from torch's in the last bits of fp32.
        error = 2e-6 if dtype == torch.float32 else 2**-7
        assert ((result - expected).abs() <= error * expected.abs() + 1e-7).all()
        assert (result == expected).float().mean() > (0.3 if dtype == torch.float32 else 0.99)
