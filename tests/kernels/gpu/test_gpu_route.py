"""The choice of experts on a GPU, run by Triton's interpreter, beside the CPU's router."""

from itertools import product
from typing import NamedTuple

import pytest
import torch

from mixchat.kernels.cpu.router import Router
from mixchat.kernels.gpu.route import route

ROUTERS = [
    ("softmax", normalized, corrected, scaling)
    for normalized, corrected, scaling in product((True, False), (True, False), (1.0, 2.5))
] + [("sigmoid", True, True, 2.5), ("sigmoid", False, False, 1.0)]


class Choice(NamedTuple):
    selected: torch.Tensor
    weights: torch.Tensor


def choice_of(x: torch.Tensor, router: Router) -> Choice:
    """Choose twice: the counter has to be 0 again."""
    logits, finished = torch.zeros(len(router.gate)), torch.zeros(1, dtype=torch.int32)
    selected = torch.full((router.choices,), -1, dtype=torch.int32)
    weights = torch.full((router.choices,), torch.nan)
    for _ in range(2):
        route(x, router, logits, selected, weights, finished)
    assert not finished.any()
    return Choice(selected, weights)


def assert_chosen_as_on_a_cpu(x: torch.Tensor, router: Router) -> None:
    choice = choice_of(x, router)
    selected, weights = router._by_torch(x.unsqueeze(0))
    assert choice.selected.tolist() == selected[0].tolist()
    assert (choice.weights - weights[0]).abs().max() < 1e-5


@pytest.mark.parametrize(("scoring", "normalized", "corrected", "scaling"), ROUTERS)
def test_experts_and_weights_are_those_of_the_cpu(scoring, normalized, corrected, scaling):
    for experts, choices, columns in ((8, 2, 96), (40, 10, 60)):
        router = Router(
            torch.randn(experts, columns) * 0.1,
            choices,
            normalized,
            torch.randn(experts) if corrected else None,
            scoring,
            torch.randn(experts) * 0.1 if corrected else None,
            scaling,
            scales=torch.rand(experts) + 0.5 if normalized else None,
            cap=0.2 if scaling == 1 else None,
        )
        assert_chosen_as_on_a_cpu(torch.randn(columns), router)


def test_the_gate_and_x_can_have_16_bits_and_columns_many_blocks():
    for dtype in (torch.bfloat16, torch.float16):
        router = Router((torch.randn(5, 2880) * 0.1).to(dtype), 4, bias=torch.randn(5))
        assert_chosen_as_on_a_cpu(torch.randn(2880).to(dtype), router)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_the_first_of_equal_logits_is_best(scoring):
    """-0 equals 0, too."""
    gate = torch.zeros(12, 16)
    gate[:, 0] = torch.tensor([0.0, 1, -0.0, 1, 0, -1, 1, 0, 1, -0.0, 0, -1])
    x = torch.zeros(16)
    x[0] = 1
    correction = torch.zeros(12) if scoring == "sigmoid" else None
    router = Router(gate, 7, scoring=scoring, correction=correction)
    assert choice_of(x, router).selected.tolist() == [1, 3, 6, 8, 0, 2, 4]


@pytest.mark.filterwarnings("ignore:(invalid value|All-NaN):RuntimeWarning")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("scaling", [1.0, 2.0])
def test_no_expert_is_chosen_twice_where_logits_are_no_numbers(value, scaling):
    choice = choice_of(torch.full((16,), value), Router(torch.ones(4, 16), 3, scaling=scaling))
    assert sorted(choice.selected.tolist()) == [0, 1, 2]
    assert choice.weights.isnan().all()


@pytest.mark.filterwarnings("ignore:(invalid value|All-NaN):RuntimeWarning")
@pytest.mark.parametrize(("scoring", "scaling"), [("softmax", 1.0), ("sigmoid", 2.0)])
def test_a_damaged_gate_does_not_pass_unseen(scoring, scaling):
    gate = torch.randn(4, 64)
    gate[2] = torch.nan
    choice = choice_of(torch.randn(64), Router(gate, 2, scoring=scoring, scaling=scaling))
    assert choice.selected[0] == 2
    assert choice.weights.isnan().any()


def test_a_shared_expert_is_weighted_by_its_gate():
    gate, x = torch.randn(1, 64) * 0.1, torch.randn(64)
    choice = choice_of(x, Router(gate, 1, normalized=False, scoring="sigmoid"))
    assert choice.selected.tolist() == [0]
    assert choice.weights[0] == pytest.approx((gate @ x).sigmoid().item())
