"""States of Gated DeltaNet and Mamba2 beside transformers' forms, however a sequence is cut."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn import functional
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import (
    GraniteMoeHybridRMSNormGated,
    mamba2_chunk_scan,
    mamba2_selective_state_update,
)
from transformers.models.qwen3_next.modeling_qwen3_next import (
    Qwen3NextRMSNormGated,
    torch_chunk_gated_delta_rule,
    torch_recurrent_gated_delta_rule,
)

from mixchat.kernels.cpu.delta_net import DeltaNetShape, DeltaRule
from mixchat.kernels.cpu.gated_norm import GatedNorm

DTYPES = (torch.float32, torch.bfloat16)
# The heads of keys and of values, and the numbers of each; of Mamba2 the groups' and those of x.
SHAPES = [
    DeltaNetShape(2, 4, 128, 128),
    DeltaNetShape(3, 9, 32, 48),
    DeltaNetShape(5, 5, 64, 16),
    DeltaNetShape(1, 3, 16, 160),
]
MAMBA_SHAPES = [DeltaNetShape(1, 4, 128, 64), *SHAPES[1:3]]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class Case(NamedTuple):
    """A rule with its weights, and its inputs: rows, numbers of the gates, and a state."""

    rule: DeltaRule
    weights: tuple[torch.Tensor, ...]
    rows: torch.Tensor
    gates: torch.Tensor
    before: torch.Tensor

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the outputs and the state after them."""
        after = torch.full_like(self.before, torch.nan)
        return self.rule(self.rows.clone(), self.gates, self.before, after), after


def random_case(shape, tokens, dtype=torch.float32, seed=0, is_mamba=False):
    torch.manual_seed(seed)
    heads = shape.value_heads
    weights = torch.rand(heads).mul(16).log(), torch.randn(heads)
    weights += (torch.randn(heads),) if is_mamba else ()
    gates = torch.randn(tokens, heads if is_mamba else 2 * heads) * 3
    rows, state = torch.randn(tokens, shape.channels), torch.randn(shape.state_shape)
    return Case(DeltaRule(shape, *weights), weights, rows, gates.to(dtype), state)


def plain_state(shape, state):
    """Return states [V, k, v] of the blocks that kernels store."""
    return state.transpose(1, 2).reshape(shape.value_heads, shape.key_dim, shape.value_dim)


def by_delta_net(function: Callable[..., Any], shape: DeltaNetShape, case: Case) -> Any:
    tokens, keys = case.rows.shape[0], shape.key_heads * shape.key_dim
    queries, keys, values = case.rows.double().split([keys, keys, case.rows.shape[1] - 2 * keys], 1)
    beta, alpha = case.gates.double().chunk(2, dim=1)
    a_log, dt_bias = case.weights
    decay = -a_log.exp() * functional.softplus(alpha + dt_bias)
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


def by_mamba(shape: DeltaNetShape, case: Case) -> Any:
    a_log, dt_bias, skips = case.weights
    tokens, keys = case.rows.shape[0], shape.key_heads * shape.key_dim
    c, b, x = case.rows.split([keys, keys, case.rows.shape[1] - 2 * keys], 1)
    state = plain_state(shape, case.before).mT[None].clone()
    inputs = x.view(1, tokens, shape.value_heads, -1), case.gates[None], -a_log.exp()
    groups = [part.reshape(1, tokens, shape.key_heads, -1) for part in (b, c)]
    options = {"dt_bias": dt_bias, "D": skips, "dt_softplus": True}
    if tokens > 1:
        states = {"initial_states": state, "return_final_states": True, "chunk_size": 16}
        out, state = mamba2_chunk_scan(*inputs, *groups, **options, **states)
    else:
        width = shape.value_dim
        values, steps = inputs[0][0], case.gates[..., None].expand(-1, -1, width)
        rates = inputs[2][:, None, None].expand(-1, width, shape.key_dim)
        options |= {name: options[name][:, None].expand(-1, width) for name in ("dt_bias", "D")}
        own = (part[:, 0] for part in groups)
        out = mamba2_selective_state_update(state, values, steps, rates, *own, **options)
    return out.reshape(tokens, -1), state[0].mT


each_rule = pytest.mark.parametrize(
    ("shape", "is_mamba"),
    [*((shape, False) for shape in SHAPES), *((shape, True) for shape in MAMBA_SHAPES)],
    ids=str,
)


@each_rule
def test_states_and_outputs_are_those_of_transformers(form, shape, is_mamba):
    forms = torch_recurrent_gated_delta_rule, torch_chunk_gated_delta_rule
    references = [by_mamba] if is_mamba else [partial(by_delta_net, each) for each in forms]
    within = 2e-5 if is_mamba else 5e-5  # transformers computes in fp32, too
    for seed, tokens in enumerate((1, 7, 300)):
        case = random_case(shape, tokens, seed=seed, is_mamba=is_mamba)
        kept = case.before.clone()
        result, after = case.run()
        assert torch.equal(case.before, kept)
        state = plain_state(shape, after)
        for reference in references:
            expected, expected_state = reference(shape, case)
            assert (result - expected).abs().max() < within * expected.abs().max()
            assert (state - expected_state).abs().max() < within * expected_state.abs().max()


@each_dtype
@each_rule
def test_a_token_has_the_same_bits_however_the_sequence_is_cut(form, shape, is_mamba, dtype):
    case = random_case(shape, 60, dtype, is_mamba=is_mamba)
    expected, whole = case.run()
    assert expected.dtype == dtype
    for cuts in ([7], [1, 2, 30], [59], range(1, 60)):
        state, pieces = case.before, []
        parts = (torch.tensor_split(tensor, list(cuts)) for tensor in (case.rows, case.gates))
        for rows, gates in zip(*parts, strict=True):
            piece, state = case._replace(rows=rows, gates=gates, before=state).run()
            pieces.append(piece)
        assert torch.equal(torch.cat(pieces), expected)
        assert torch.equal(state, whole)


def test_threads_do_not_change_bits():
    case = random_case(SHAPES[1], 50, torch.bfloat16)
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(case.run())
    torch.set_num_threads(1)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("alpha", [-90.0, -20.0, 0.0, 20.0, 90.0])
def test_extreme_decays_are_those_of_torch(form, alpha):
    shape = SHAPES[2]
    case = random_case(shape, 1)
    case.gates[:, shape.value_heads :] = alpha
    case.rows[:, 2 * shape.key_heads * shape.key_dim :] = 0
    expected, _ = by_delta_net(torch_recurrent_gated_delta_rule, shape, case)
    result, _ = case.run()
    assert (result - expected).abs().max() <= 2e-6 * case.before.abs().max()


@each_dtype
@pytest.mark.parametrize("gate_first", [False, True], ids=["DeltaNet", "Mamba2"])
def test_the_gated_norm_rounds_where_transformers_does(form, dtype, gate_first):
    for tokens, heads, width in ((1, 3, 128), (7, 5, 48), (300, 2, 32)):
        x = torch.randn(tokens, heads * width).to(dtype)
        gate = (torch.randn(tokens, heads * width + 32) * 3).to(dtype)[:, 16:-16]
        norm = Qwen3NextRMSNormGated(width, eps=1e-6)
        if gate_first:
            norm = GraniteMoeHybridRMSNormGated(heads * width, width, eps=1e-6)
        norm.to(dtype).weight.data = torch.randn(len(norm.weight)).to(dtype)
        row = heads * width if gate_first else width
        expected = norm(x.view(-1, row), gate.reshape(-1, row)).view(x.shape).detach()
        groups = (heads,) if gate_first else ()
        result = GatedNorm(norm.weight.data, 1e-6, *groups)(x, gate)
        assert result.dtype == dtype
        # The kernel's silu differs from torch's in the last bits of fp32.
        error = 2e-6 if dtype == torch.float32 else 2**-7
        assert ((result - expected).abs() <= error * expected.abs() + 1e-7).all()
        if not gate_first:
            assert (result == expected).float().mean() > (0.3 if dtype == torch.float32 else 0.99)
