"""The choice of experts, against torch's topk and softmax in double precision."""

import pytest
import torch

from mixchat.kernels import router
from mixchat.kernels.compile import instruction_set

pytestmark = pytest.mark.skipif(instruction_set() is None, reason="kernels need AVX2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "experts", "choices"), [(1, 8, 2), (3, 16, 3), (300, 8, 8)])
def test_the_experts_are_those_of_the_largest_logits_and_the_weights_their_softmax(
    dtype: torch.dtype, tokens: int, experts: int, choices: int
) -> None:
    torch.manual_seed(0)
    x, gate = torch.randn(tokens, 576).to(dtype), torch.randn(experts, 576) * 0.1
    logits, best = (x.double() @ gate.double().T).topk(choices, dim=-1)
    selected, weights = router.route(x, gate, choices)
    assert torch.equal(selected, best)
    assert (weights - logits.softmax(-1)).abs().max() < 1e-5
    assert (weights.sum(-1) - 1).abs().max() < 1e-6


def test_of_equal_logits_the_first_is_chosen_and_none_twice() -> None:
    selected, weights = router.route(torch.ones(1, 64), torch.ones(4, 64), 3)
    assert selected.tolist() == [[0, 1, 2]]
    assert weights[0].tolist() == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_no_expert_is_chosen_twice_where_logits_are_no_numbers(value: float) -> None:
    selected, weights = router.route(torch.full((1, 64), value), torch.ones(4, 64), 3)
    assert sorted(selected[0].tolist()) == [0, 1, 2]
    assert weights.isnan().all()


def test_a_damaged_gate_does_not_pass_unseen() -> None:
    """As with torch: what is no number is chosen first, and gets into the result."""
    gate = torch.randn(4, 64)
    gate[2] = torch.nan
    selected, weights = router.route(torch.randn(1, 64), gate, 2)
    assert selected[0, 0] == 2
    assert weights.isnan().any()


def test_an_expert_that_cannot_be_chosen_has_no_weight() -> None:
    gate = torch.tensor([1.0, 2.0, -torch.inf])[:, None].repeat(1, 64)
    selected, weights = router.route(torch.full((1, 64), 0.01), gate, 3)
    assert selected.tolist() == [[1, 0, 2]]
    assert weights[0, 2] == 0
    assert weights.sum() == pytest.approx(1)


def test_what_it_cannot_compute_is_left_to_torch() -> None:
    gate = torch.empty(8, 64)
    assert router.can_route(torch.empty(1, 64), gate)
    assert not router.can_route(torch.empty(1, 64, device="meta"), gate)
    assert not router.can_route(torch.empty(1, 60), torch.empty(8, 60))
    assert not router.can_route(torch.empty(1, 64), torch.empty(router._MAX_EXPERTS + 1, 64))
    torch.manual_seed(0)
    x, gate = torch.randn(5, 60), torch.randn(8, 60)
    logits, best = (x.double() @ gate.double().T).topk(2, dim=-1)
    selected, weights = router.route(x, gate, 2)
    assert torch.equal(selected, best)
    assert (weights - logits.softmax(-1)).abs().max() < 1e-5
